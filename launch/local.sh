#!/usr/bin/env bash
#
# Trains on this machine: one process on all of its devices.
#
#   launch/local.sh [options] -- --config digits --workdir runs/digits
#
#   --restarts N    start a run that failed or was stopped again, so often  [0]
#   --processes N   rehearse many machines: N processes on the CPU  [1]
#   --port P        where the processes meet  [12345]
#   --grace S       seconds that the others have when one has failed  [30]
#   --dry-run       print what would run, and run nothing
#
# What follows -- goes to djpq train. Ctrl-C and SIGTERM let the run save its
# state; the same command goes on.

set -eu
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

restarts=0 processes=1 port=12345 grace=30 dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --restarts) need "$@"; restarts=$2; shift 2 ;;
    --processes) need "$@"; processes=$2; shift 2 ;;
    --port) need "$@"; port=$2; shift 2 ;;
    --grace) need "$@"; grace=$2; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) usage; exit ;;
    --) shift; break ;;
    *) fail "there is no option $1; arguments of djpq train go after --" ;;
  esac
done
count --restarts "$restarts" 0
count --processes "$processes" 1
count --port "$port" 1
count --grace "$grace" 0
check_arguments "$@"

# one INDEX arguments ...: runs one of the processes.
one() {
  local index=$1
  shift
  set -- djpq train "$@"
  # Each would take all GPUs of the machine, so they rehearse on the CPU.
  [ "$processes" -eq 1 ] || set -- env "JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}" \
    "$@" --coordinator "localhost:$port" \
    --process-count "$processes" --process-index "$index"
  [ -n "$dry_run" ] || exec "$@"  # signals have to reach it
  run "$@"
}

# Runs all processes; the status is that of the first that was seen to fail.
all() {
  local index=0 left pid code status=0 failed=
  pids=
  while [ "$index" -lt "$processes" ]; do
    if [ -n "$dry_run" ]; then
      one "$index" "$@"
    else
      one "$index" "$@" &
      pids="$pids $!"
    fi
    index=$((index + 1))
  done
  while [ -n "$pids" ]; do
    left=
    for pid in $pids; do
      if kill -0 "$pid" 2>/dev/null; then
        left="$left $pid"
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if [ "$code" -ne 0 ] && [ -z "$failed" ]; then
        status=$code failed=$SECONDS
      fi
    done
    pids=$left
    # The others wait for the one that failed, and most notice; not all.
    [ -z "$failed" ] || [ $((SECONDS - failed)) -le "$grace" ] || pass_on KILL
    [ -z "$pids" ] || sleep 0.2
  done
  return "$status"
}

pass_on() {
  local pid
  for pid in $pids; do
    kill "-$1" "$pid" 2>/dev/null || :
  done
}

when_stopped() { pass_on TERM; }

[ -n "$dry_run" ] || command -v djpq >/dev/null ||
  fail 'there is no djpq on the PATH; activate its environment first'
restarting "$restarts" all "$@"
