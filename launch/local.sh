#!/usr/bin/env bash
# Train with several CPU processes on this machine, as several hosts would: a rehearsal, and what the tests use.
#
#   bash launch/local.sh NUM_PROCESSES [CONFIG.py | RUN] [--section.field value ...]
#
# Each line of output begins with the number of its process. SIGTERM and Ctrl-C reach all of them; the exit status is 75
# if they were preempted (start the same command again to go on), else the first that is not 0.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) || exit 1

if ! [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "error: how many processes? write: bash launch/local.sh 2 configs/quickstart.py --run-dir runs/two" >&2
  exit 2
fi
processes=$1
shift
python=${PYTHON:-python}
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((id = 0; id < processes; id++)); do
  "$python" "$root/train.py" "$@" --distributed.coordinator "localhost:$port" --distributed.num-processes "$processes" \
    --distributed.process-id "$id" > >(sed -u "s/^/$id: /") 2> >(sed -u "s/^/$id: /" >&2) &
  pids+=($!)
done

status=0
for pid in "${pids[@]}"; do
  wait "$pid"
  code=$?
  while kill -0 "$pid" 2>/dev/null; do # a signal ended the waiting, not the process
    wait "$pid"
    code=$?
  done
  if ((code == 75 || (code != 0 && status == 0))); then status=$code; fi
done
exit "$status"
