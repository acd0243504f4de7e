#!/usr/bin/env bash
#
# Trains on Kubernetes: one JobSet, one pod per machine.
#
#   launch/kubernetes.sh --name N --image I [options] \
#     -- --config digits --workdir /data/digits
#
#   --name N           of the JobSet
#   --image I          container image in which djpq is installed
#   --namespace S      [that of kubectl]
#   --nodes N          machines  [1]
#   --gpus N           NVIDIA GPUs of each machine  [0]
#   --tpus N           TPU chips of each machine  [0]
#   --select KEY=VALUE label that the machines have; repeatable
#   --volume CLAIM     volume claim, at /data in each pod
#   --restarts N       start a run that failed or was evicted again  [10]
#   --sweep N          N runs of one machine, in an indexed Job, that read 0 to
#                      N-1 in $(JOB_COMPLETION_INDEX)
#   --dry-run          print the manifest, and apply nothing
#
# What follows -- goes to djpq train.

set -eu
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
# shellcheck source=launch/manifest.sh
. "$(dirname "$0")/manifest.sh"

name='' image='' namespace='' nodes=1 gpus=0 tpus=0 labels='' volume=''
restarts=10 sweep='' dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --name) need "$@"; name=$2; shift 2 ;;
    --image) need "$@"; image=$2; shift 2 ;;
    --namespace) need "$@"; namespace=$2; shift 2 ;;
    --nodes) need "$@"; nodes=$2; shift 2 ;;
    --gpus) need "$@"; gpus=$2; shift 2 ;;
    --tpus) need "$@"; tpus=$2; shift 2 ;;
    --select)
      need "$@"
      case $2 in ?*=*) ;; *) fail "--select takes KEY=VALUE, not '$2'" ;; esac
      labels="$labels      $(yaml "${2%%=*}"): $(yaml "${2#*=}")
"
      shift 2 ;;
    --volume) need "$@"; volume=$2; shift 2 ;;
    --restarts) need "$@"; restarts=$2; shift 2 ;;
    --sweep) need "$@"; sweep=$2; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) usage; exit ;;
    --) shift; break ;;
    *) fail "there is no option $1; arguments of djpq train go after --" ;;
  esac
done
require --name "$name"
require --image "$image"
count --nodes "$nodes" 1
count --gpus "$gpus" 0
count --tpus "$tpus" 0
count --restarts "$restarts" 0
[ "$gpus" -eq 0 ] || [ "$tpus" -eq 0 ] || fail 'give --gpus or --tpus, not both'
if [ -n "$sweep" ]; then
  count --sweep "$sweep" 1
  [ "$nodes" -eq 1 ] || fail 'a --sweep has one machine per run; for runs of'\
' several machines, apply one JobSet per run'
fi
check_arguments "$@"
# shellcheck disable=SC2016  # Kubernetes fills it in
case ${sweep:+$*} in
  '' | *'$(JOB_COMPLETION_INDEX)'*) ;;
  *) fail 'put $(JOB_COMPLETION_INDEX) into --workdir, in single quotes' ;;
esac
# In a quoted scalar of YAML it would become a space.
case "$name$image$namespace$volume$*" in
  *$'\n'*) fail 'no value may hold a line break' ;;
esac

# The processes of TPUs find each other; others are told by the names of pods.
if [ "$nodes" -gt 1 ] && [ "$tpus" -gt 0 ]; then
  set -- "$@" --distributed
elif [ "$nodes" -gt 1 ]; then
  # shellcheck disable=SC2016  # Kubernetes fills it in
  set -- "$@" --coordinator "$name-workers-0-0.$name:12345" \
    --process-count "$nodes" --process-index '$(JOB_COMPLETION_INDEX)'
fi

if [ -n "$sweep" ]; then kind=sweep_job; else kind=job_set; fi
if [ -n "$dry_run" ]; then
  "$kind" "$@"
else
  "$kind" "$@" | kubectl apply -f -
fi
