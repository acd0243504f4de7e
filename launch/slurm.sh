#!/usr/bin/env bash
#
# Trains on a SLURM cluster: writes a batch script, and submits it.
#
#   launch/slurm.sh [options] -- --config digits --workdir /shared/digits
#
#   --nodes N       machines  [1]
#   --gpus N        GPUs of each machine that the job takes  [0]
#   --cpus N        CPU cores of each process  [those of SLURM]
#   --per gpu       one process per GPU, not one per node  [node]
#   --grace S       seconds before its end that a run is asked to save  [120]
#   --sweep N       N runs, that read 0 to N-1 in $SLURM_ARRAY_TASK_ID
#   --setup LINE    shell, before all else: 'module load cuda'; repeatable
#   --sbatch FLAG   any other option of sbatch, as --time=8:00:00; repeatable
#   --dry-run       print the script, and submit nothing
#
# What follows -- goes to djpq train. A run that was preempted, or that reached
# its time limit, saves its state and waits in the queue again.

# shellcheck disable=SC2016  # the job's shell fills variables in, not ours
set -eu
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

nodes=1 gpus=0 cpus='' per=node grace=120 sweep='' setup='' flags='' dry_run=
while [ $# -gt 0 ]; do
  case $1 in
    --nodes) need "$@"; nodes=$2; shift 2 ;;
    --gpus) need "$@"; gpus=$2; shift 2 ;;
    --cpus) need "$@"; cpus=$2; shift 2 ;;
    --per) need "$@"; per=$2; shift 2 ;;
    --grace) need "$@"; grace=$2; shift 2 ;;
    --sweep) need "$@"; sweep=$2; shift 2 ;;
    --setup) need "$@"; setup=$setup$2$'\n'; shift 2 ;;
    --sbatch) need "$@"; flags="$flags#SBATCH $2"$'\n'; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --help | -h) usage; exit ;;
    --) shift; break ;;
    *) fail "there is no option $1; arguments of djpq train go after --" ;;
  esac
done
count --nodes "$nodes" 1
count --gpus "$gpus" 0
[ -z "$cpus" ] || count --cpus "$cpus" 1
count --grace "$grace" 1
[ -z "$sweep" ] || count --sweep "$sweep" 1
case $per in
  node) tasks=1 ;;
  gpu) count --gpus "$gpus" 1; tasks=$gpus ;;
  *) fail "--per must be node or gpu, and is '$per'" ;;
esac
check_arguments "$@"
case ${sweep:+$*} in
  '' | *'$SLURM_ARRAY_TASK_ID'*) ;;
  *) fail 'put $SLURM_ARRAY_TASK_ID into --workdir, in single quotes' ;;
esac

script() {
  local train job='$SLURM_JOB_ID' task='$SLURM_ARRAY_TASK_ID' ids=0 id
  [ $((nodes * tasks)) -eq 1 ] || set -- "$@" --distributed
  train=$(quoted djpq train "$@")
  if [ -n "$sweep" ]; then
    train=$(quoted djpq train "$@" | sed "s/\\$task/'\"\\$task\"'/g")
    # The id of the job itself would requeue the whole array.
    job='${SLURM_ARRAY_JOB_ID}_'$task
  fi
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=djpq
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$tasks
END
  [ "$gpus" -eq 0 ] || echo "#SBATCH --gpus-per-node=$gpus"
  [ -z "$cpus" ] || echo "#SBATCH --cpus-per-task=$cpus"
  [ -z "$sweep" ] || echo "#SBATCH --array=0-$((sweep - 1))"
  cat <<END
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@$grace
${flags}set -e
END
  printf '%s' "$setup"
  # srun does not take it over from sbatch.
  [ -z "$cpus" ] || echo "export SRUN_CPUS_PER_TASK=$cpus"
  if [ "$per" = node ] && [ "$gpus" -gt 1 ]; then
    for ((id = 1; id < gpus; id++)); do ids=$ids,$id; done
    # Else JAX gives each process one GPU when it finds itself in SLURM.
    echo "export JAX_LOCAL_DEVICE_IDS=$ids"
  fi
  cat <<END
status=0
srun --kill-on-bad-exit=1 $train || status=\$?
# Stopped before it was done, and saved.
[ "\$status" -ne 143 ] || scontrol requeue "$job"
exit "\$status"
END
}

if [ -n "$dry_run" ]; then script "$@"; else script "$@" | sbatch; fi
