#!/usr/bin/env bash
# local.sh RANKS CONFIG [a.b=c ...] [--run-dir DIR]: train on this machine with RANKS processes.
#
# torchrun by itself dies of SIGUSR1, and 30 s after SIGTERM it kills ranks that are still writing a checkpoint. Here both
# signals reach the ranks, which save and exit, and they get SHUTDOWN_TIMEOUT seconds for it (default 600). Nothing listens
# on a network.
# Exit code: 0 done, 2 wrong configuration or input, 75 stopped on request: the same command resumes.
set -uo pipefail
ranks=${1:?usage: local.sh RANKS CONFIG [a.b=c ...] [--run-dir DIR]}
shift
# in half a second, and with the exit code that torchrun would turn into 1
python -m megatron_synth train "$@" --dry-run --world-size "$ranks" >/dev/null || exit $?
stopping=0
python -m megatron_synth.cluster.agent --local --nproc-per-node "$ranks" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-600}" \
  -m megatron_synth train "$@" &
agent=$!
# torchrun exits 1 after a signal, whatever the ranks did: what counts is whether a stop was asked for
trap 'stopping=1; kill -USR1 "$agent"' USR1
trap 'stopping=1; kill -TERM "$agent"' TERM INT
wait "$agent"
code=$?
while kill -0 "$agent" 2>/dev/null; do # a trapped signal ends `wait` before the process has ended
  wait "$agent"
  code=$?
done
if [ "$stopping" = 1 ]; then exit 75; fi
exit "$code"
