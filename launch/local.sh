#!/usr/bin/env bash
# local.sh RANKS CONFIG [a.b=c ...] [--run-dir DIR]: train on this machine with RANKS processes.
#
# torchrun by itself dies of SIGUSR1, and 30 s after SIGTERM it kills ranks that are still writing a checkpoint. Here both
# signals, and Ctrl-C, reach the ranks, which save and exit, and they get SHUTDOWN_TIMEOUT seconds for it (default 600).
# A second Ctrl-C ends them at once. Nothing listens on a network.
# Exit code: 0 done, 2 wrong configuration or input, 70 a rank hangs or is gone, 75 stopped on request; after 70 and 75 the same
# command resumes.
set -uo pipefail
agent='' asked='' stopping=0 interrupts=0
hand_on() { # the signal that was asked for last, once there is somebody to hand it to
  if [ -n "$agent" ] && [ -n "$asked" ]; then kill -"$asked" "$agent" 2>/dev/null; asked=''; fi
}
ask() {
  stopping=1 asked=$1
  hand_on
}
interrupt() {
  interrupts=$((interrupts + 1))
  if [ "$interrupts" = 1 ]; then ask INT; fi
  if [ "$interrupts" = 2 ] && [ -n "$agent" ]; then # torchrun first: it would call the end of its ranks a failure
    kill -STOP "$agent" && pkill -KILL -P "$agent"
    kill -KILL "$agent"
  fi
}
killed() { # who was ended by a signal that nobody here asked for
  echo "error: $1 ended by signal $((code - 128)); the same command resumes" >&2
  exit 70
}
# before everything else: a request in the first second is one, too
trap 'ask USR1' USR1
trap 'ask TERM' TERM HUP
trap interrupt INT
ranks=${1:?usage: local.sh RANKS CONFIG [a.b=c ...] [--run-dir DIR]}
shift
echo "${1:-}: checked, then trained on $ranks ranks, which start within some seconds"
# in half a second, and with the exit code that torchrun would turn into 1
python -m megatron_synth train "$@" --dry-run --world-size "$ranks" >/dev/null
code=$?
if [ "$stopping" = 1 ]; then exit 75; fi
if [ "$code" -gt 128 ]; then killed 'the check'; fi
if [ "$code" != 0 ]; then exit "$code"; fi
# A session of its own: Ctrl-C in a terminal reaches this script alone. torchrun that gets a second signal while it waits for its
# ranks leaves them behind.
setsid python -m megatron_synth.cluster.agent --local --nproc-per-node "$ranks" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
  -m megatron_synth train "$@" &
agent=$!
hand_on
# torchrun exits 1 after a signal, whatever the ranks did: what counts is whether a stop was asked for
wait "$agent"
code=$?
while kill -0 "$agent" 2>/dev/null; do # a trapped signal ends `wait` before the process has ended
  wait "$agent"
  code=$?
done
if [ "$interrupts" -gt 1 ]; then exit 130; fi
if [ "$stopping" = 1 ]; then exit 75; fi
if [ "$code" -gt 128 ]; then killed 'the launcher, and its ranks with it,'; fi
exit "$code"
