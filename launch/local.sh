#!/usr/bin/env bash
# N processes of train.py on this machine that train as one, on its CPU: a cluster to try things on.
#
#   bash launch/local.sh N [CONFIG.py | RUN] [--section.field value ...]
#
# Each line of output begins with the number of the process it comes from. TERM and Ctrl-C reach every process, which
# save and end. The exit status is 75 if that of any process is (start the same command again), else the first that
# is not zero.
#
# PYTHON is the interpreter (default: python). XLA_FLAGS=--xla_force_host_platform_device_count=2 gives each process two
# devices. JAX_PLATFORMS is cpu unless it is set: processes of one machine would all take the same GPU.
set -u -m # -m: each process is a group of its own, so that a terminal's Ctrl-C comes here alone and is passed on once

if [[ ! ${1-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: bash $0 N [CONFIG.py | RUN] [--section.field value ...]" >&2
  exit 2
fi
count=$1
shift
train=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/train.py
python=${PYTHON:-python}
export JAX_PLATFORMS=${JAX_PLATFORMS-cpu} PYTHONUNBUFFERED=1

# A port on which nobody answers, below those that the system hands out by itself.
port=$((20000 + RANDOM % 12000))
while (exec 3<>"/dev/tcp/localhost/$port") 2>/dev/null; do
  port=$((20000 + RANDOM % 12000))
done

pipes=$(mktemp -d)
trap 'rm -rf "$pipes"' EXIT

prefix() { # each line of a pipe, after the number of its process
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s: %s\n' "$2" "$line"
  done <"$1"
}

processes=()
readers=()
signalled=
forward() {
  signalled=$1
  kill -s "$1" "${processes[@]}" 2>/dev/null # one that has ended already is none to complain about
}
trap 'forward TERM' TERM HUP
trap 'forward INT' INT

for ((number = 0; number < count; number++)); do
  out=$pipes/out$number err=$pipes/err$number
  mkfifo "$out" "$err"
  prefix "$out" "$number" &
  readers+=($!)
  prefix "$err" "$number" >&2 &
  readers+=($!)
  "$python" "$train" "$@" --distributed.coordinator "localhost:$port" --distributed.num-processes "$count" \
    --distributed.process-id "$number" </dev/null >"$out" 2>"$err" &
  processes+=($!)
done
if [[ -n $signalled ]]; then # before all of them were there
  forward "$signalled"
fi

ended() { # wait until a process is over; a signal that is passed on ends bash's wait, but not the process
  local again
  signalled=
  wait "$1"
  ended=$?
  while [[ -n $signalled ]]; do
    signalled=
    wait "$1" 2>/dev/null
    again=$?
    [[ $again == 127 ]] || ended=$again # 127: it was over, and its status has been told already
  done
}

status=0
for process in "${processes[@]}"; do
  ended "$process"
  if [[ $ended == 75 || $status == 0 ]]; then
    status=$ended
  fi
done
for reader in "${readers[@]}"; do
  ended "$reader"
done
exit "$status"
