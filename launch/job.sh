# job.sh: what train.sbatch and array.sbatch have in common. Sourced by the batch shell, on the first node of the job.
#
# The step runs in the background, so that a signal reaches the traps here at once.
#   USR1  the time limit is near, or the job is preempted: the ranks are asked to save and leave, then the job is requeued.
#   TERM  Slurm ends the job (canceled, preempted without USR1, a node lost) and has told the ranks itself. Slurm also
#         decides whether the job comes back: requeueing it from here would revive a job that its owner has canceled.
# What follows the end of a step is decided by megatron_synth.cluster.verdict, from what the ranks left in OUTCOMES.

# A request may come before there is a step that could be asked, while Slurm's commands below take their time.
stopping=0
trap 'stopping=1' USR1

# an array task by its own name: the number of its array's last task is also that of the whole array
JOB=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
RESTART=${SLURM_RESTART_COUNT:-0}
export JOB_DIR LAUNCH PYTHON RANKS_PER_NODE SAVE_WAIT
export MEGATRON_SYNTH_OUTCOMES="$JOB_DIR/outcomes/$JOB.$RESTART"
# the working directory is not searched for modules: a job runs the code that it was submitted with
export PYTHONSAFEPATH=1

say() { echo "$(date -u +%FT%TZ) job $JOB, start $((RESTART + 1)): $*"; }

# node names need not resolve; the address is what Slurm itself reaches the node by
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node -o "$first_node" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
# one per job and start, so that neither another job on the node nor a rank left from the last start holds it; below 32768,
# from where the kernel hands out ports
MASTER_PORT=$((12000 + (SLURM_JOB_ID + 101 * RESTART) % 20000))
export MASTER_ADDR MASTER_PORT
# what ranks tell each other through the store on the first node is signed with it (train/checkpoint/mailbox.py)
MEGATRON_SYNTH_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MEGATRON_SYNTH_SECRET

# here and not through srun where it can be: a step costs a second. HOST_RUNNER holds srun with the image, or apptainer
verdict() {
  ${HOST_RUNNER[@]+"${HOST_RUNNER[@]}"} "$PYTHON" -m megatron_synth.cluster.verdict "$@" \
    --job "$JOB" --restart "$RESTART" --job-dir "$JOB_DIR" --max-restarts "${MAX_RESTARTS:-20}"
}

# run_step COMMAND...: run it on every node of the job, then leave, requeued or for good
run_step() {
  local step code ended=0 options=()
  trap 'stopping=1; say "asked to stop, ranks will save"; scancel --signal=USR1 "$JOB"' USR1
  trap 'ended=1; say "ended by Slurm (SIGTERM)"' TERM
  mkdir -p "$MEGATRON_SYNTH_OUTCOMES"
  verdict begin --nodes "$SLURM_JOB_NODELIST" || exit 1
  # srun does not take this over from sbatch since Slurm 22.05: without it ranks would share one core
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then options+=(--cpus-per-task "$SLURM_CPUS_PER_TASK"); fi
  say "on $SLURM_JOB_NODELIST, first node at $MASTER_ADDR:$MASTER_PORT"
  if [ "$stopping" = 1 ]; then # there was no step yet that could have been asked
    set -- bash -c 'exit 75'
  fi
  srun --ntasks "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 ${options[@]+"${options[@]}"} \
    ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"} ${NODE_RUNNER[@]+"${NODE_RUNNER[@]}"} "$@" &
  step=$!
  wait "$step"
  code=$?
  while kill -0 "$step" 2>/dev/null; do # a trapped signal ends `wait` before the step has ended
    wait "$step"
    code=$?
  done
  if [ "$ended" = 1 ]; then
    verdict ended || true
    exit 143
  fi
  # the last line of what it prints: "requeue", or "exit CODE"
  local decision
  decision=$(verdict end --code "$code" $([ "$stopping" = 1 ] && echo --stopping) | tail -n 1)
  case "$decision" in
    requeue)
      if scontrol requeue "$JOB"; then
        trap : TERM USR1 # Slurm ends this shell when it takes the job back; not '', which `sleep` would inherit
        sleep 600
        exit 75
      fi
      say "Slurm does not take the job back into the queue; submit it again to resume"
      exit 75
      ;;
    "exit "*) exit "${decision#exit }" ;;
    *) exit "$code" ;; # the verdict itself failed and has said why: never a restart without one
  esac
}
