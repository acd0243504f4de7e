#!/usr/bin/env bash
#
# Trains on a Cloud TPU VM, or on all the VMs of a slice.
#
#   launch/tpu.sh create --name N --zone Z --type v5litepod-16 --version V
#   launch/tpu.sh install --name N --zone Z --package SPEC
#   launch/tpu.sh train --name N --zone Z -- --config digits --workdir /mnt/run
#   launch/tpu.sh stop --name N --zone Z       (the run saves its state)
#   launch/tpu.sh delete --name N --zone Z
#
#   --name N        of the slice, and of the queued resource it is asked for as
#   --zone Z        where it is
#   --project P     [that of gcloud]
#   --type T        accelerator type
#   --version V     runtime version
#   --spot          may be taken away; costs less
#   --package SPEC  what pip installs beside jax[tpu]: a URL, a requirement
#   --restarts N    start a run that failed again, so often  [0]
#   --dry-run       print what would run, and run nothing
#
# What follows -- goes to djpq train, on every VM.

set -eu
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

action=${1:-}
case $action in
  create | install | train | stop | delete) shift ;;
  --help | -h) usage; exit ;;
  *) fail 'say one of create, install, train, stop, delete first; see --help' ;;
esac
name='' zone='' project='' type='' version='' spot='' package='' restarts=0
dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --name) need "$@"; name=$2; shift 2 ;;
    --zone) need "$@"; zone=$2; shift 2 ;;
    --project) need "$@"; project=$2; shift 2 ;;
    --type) need "$@"; type=$2; shift 2 ;;
    --version) need "$@"; version=$2; shift 2 ;;
    --spot) spot=1; shift ;;
    --package) need "$@"; package=$2; shift 2 ;;
    --restarts) need "$@"; restarts=$2; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) usage; exit ;;
    --) shift; break ;;
    *) fail "there is no option $1; arguments of djpq train go after --" ;;
  esac
done
require --name "$name"
require --zone "$zone"
count --restarts "$restarts" 0

tpus() {
  run gcloud compute tpus "$@" --zone "$zone" ${project:+--project "$project"}
}

# Runs a line of shell on every VM, in the home folder.
everywhere() {
  tpus tpu-vm ssh "$name" --worker all --command "$1"
}

# What `stop` ended from another shell is not to be started again here.
before='rm -f djpq-stop; '
train() {
  local first=$before
  before='test ! -e djpq-stop || exit 130; '
  everywhere "${first}djpq/bin/djpq train $1 --distributed \
|| { s=\$?; test ! -e djpq-stop || s=130; exit \$s; }"
}

case $action in
  create)
    require --type "$type"
    require --version "$version"
    tpus queued-resources create "$name" --node-id "$name" \
      --accelerator-type "$type" --runtime-version "$version" ${spot:+--spot}
    ;;
  install)
    require --package "$package"
    # The Python of the VM images is too old; uv brings its own.
    everywhere "python3 -m pip install --user uv \
&& .local/bin/uv venv --clear --python 3.12 djpq \
&& .local/bin/uv pip install --python djpq/bin/python $(
      quoted 'jax[tpu]' "$package"
    )"
    ;;
  train)
    check_arguments "$@"
    restarting "$restarts" train "$(quoted "$@")"
    ;;
  stop) everywhere 'touch djpq-stop; pkill -TERM -x djpq' ;;
  delete) tpus queued-resources delete "$name" --force ;;
esac
