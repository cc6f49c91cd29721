#!/usr/bin/env bash
#SBATCH --job-name=qwen-image-edit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@600
#
# Trains on several machines of a Slurm cluster. Options for sbatch go before the script, settings of the training after it:
#
#   sbatch --nodes=4 --partition=gpu scripts/slurm_multinode.sh +exp=lbm_2511 data.dataset=pairs.json data.root=photos run_dir=runs/mine train.global_batch_size=32
#
# run_dir, the data, the model and this repository must be on a disk that all machines share. Ten minutes before the time
# limit, the training saves its last complete step, and the job is queued again. When it starts again, also after a failed
# machine or a preemption, it resumes from the newest checkpoint. scripts/launch.sh explains NPROC, WANDB_* and the other
# variables.
set -euo pipefail
: "${SLURM_JOB_ID:?start this with sbatch}" "${SLURM_JOB_NODELIST:?}" "${SLURM_NNODES:?}"

# sbatch runs a copy of this file from its spool folder, so that the file's own place says nothing.
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*slurm_multinode\.sh\).*/\1/p')
for repo in "${REPO:-}" "$(dirname "${submitted:-.}")/.." "${SLURM_SUBMIT_DIR:-.}" "$(dirname "${BASH_SOURCE[0]}")/.."; do
  if [ -f "$repo/scripts/launch.sh" ]; then break; fi
done
[ -f "$repo/scripts/launch.sh" ] || {
  echo "error: the repository was not found: submit the job from its folder, or set REPO=FOLDER" >&2
  exit 2
}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]} MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) NUM_MACHINES=$SLURM_NNODES
export NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take it over from sbatch
unset MACHINE_RANK                                  # every machine takes SLURM_NODEID

requeue=
# shellcheck disable=SC2329
save() {
  echo "the time limit is near: saving, then queueing the job again" >&2
  requeue=yes
  scancel --signal=USR1 "$SLURM_JOB_ID" || true # to launch.sh on every machine, not to this script
}
trap save USR1

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash "$repo/scripts/launch.sh" "$@" &
step=$!
while true; do
  code=0
  wait "$step" || code=$?
  kill -0 "$step" 2>/dev/null || break # still there: a signal has ended the waiting, not the step
done
if [ -n "$requeue" ] && [ "$code" != 0 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
