#!/usr/bin/env bash
# Starts train/run.py with accelerate on this machine and passes all arguments on to it. The other launchers call this script.
#
#   NPROC=4 bash scripts/launch.sh +exp=lbm_2511 data.dataset=pairs.json data.root=photos run_dir=runs/mine
#
# NPROC                     number of processes on this machine; by default one per GPU, or one without a GPU
# WANDB_PROJECT, WANDB_NAME project and name of the run in Weights & Biases; by default `qwen-image` and the run's name
# ACCELERATE_CONFIG         your own accelerate file, which decides everything that is not set here
# NUM_MACHINES, MACHINE_RANK, MASTER_ADDR, MASTER_PORT   used for several machines; scripts/slurm_multinode.sh sets them
#
# SHUTDOWN_SECONDS          longest time that a training may take to save when it is stopped; by default 600
#
# On SIGTERM, SIGUSR1 or Ctrl-C, the training saves its last complete step and stops. A second signal kills it. The exit code
# is then 128 plus the signal's number, and the same command resumes the training.
#
# Paths are relative to the current folder. The environment is the active one, else the repository's .venv,
# else that of an `accelerate` on the path, else the one that uv makes.
set -euo pipefail
scripts=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
repo=$(dirname "$scripts")

refuse() {
  echo "error: $*" >&2
  exit 2
}

count_gpus() {
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[^-]' || true
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true
  fi
}

if [ -x "${VIRTUAL_ENV:-}/bin/accelerate" ]; then
  PATH="$VIRTUAL_ENV/bin:$PATH" accelerate=(accelerate)
elif [ -x "$repo/.venv/bin/accelerate" ]; then
  PATH="$repo/.venv/bin:$PATH" accelerate=(accelerate) # PATH: DeepSpeed looks for ninja
elif command -v accelerate >/dev/null; then
  accelerate=(accelerate)
elif command -v uv >/dev/null; then
  accelerate=(uv run --project "$repo" accelerate)
else
  refuse "there is no accelerate: install with 'pip install uv', then run 'uv sync' in $repo"
fi

given=${NPROC:-}
num_machines=${NUM_MACHINES:-1}
NPROC=${NPROC:-$(count_gpus)}
[ "$NPROC" = 0 ] && [ -z "$given" ] && NPROC=1
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || refuse "NPROC must be a positive whole number, got '$NPROC'"
total=$((NPROC * num_machines))

if [ -z "${ACCELERATE_CONFIG:-}" ]; then
  options=(--config_file "$scripts/accelerate.yaml" --num_processes "$total")
  if ((total > 1)); then
    options+=(--multi_gpu) # on CPU too: --cpu would start one process
  fi
else
  [ -f "$ACCELERATE_CONFIG" ] || refuse "ACCELERATE_CONFIG=$ACCELERATE_CONFIG does not exist"
  options=(--config_file "$ACCELERATE_CONFIG")
  if [ -n "$given" ]; then
    options+=(--num_processes "$total")
  fi
fi
if ((num_machines > 1)); then
  rank=${MACHINE_RANK:-${SLURM_NODEID:-}}
  [ -n "$rank" ] && [ -n "${MASTER_ADDR:-}" ] && [ -n "${MASTER_PORT:-}" ] ||
    refuse "NUM_MACHINES=$num_machines needs MACHINE_RANK, MASTER_ADDR and MASTER_PORT too"
  options+=(--num_machines "$num_machines" --machine_rank "$rank" --rdzv_backend static)
  options+=(--main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
elif ((total > 1)); then
  options+=(--main_process_port "${MASTER_PORT:-0}") # 0: a free one, so that two runs can share a machine
fi

# accelerate does not pass signals on to its processes, or kills them soon after: they are asked through a file instead, and
# accelerate runs in a process group of its own, which Ctrl-C does not reach.
LAUNCH_FOLDER=$(mktemp -d)
export LAUNCH_FOLDER TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_SECONDS:-600}
trap 'rm -rf "$LAUNCH_FOLDER"' EXIT
asked=

# shellcheck disable=SC2329
ask_to_stop() { # signal's number
  if [ -n "$asked" ] || ! compgen -G "$LAUNCH_FOLDER/pid-*" >/dev/null; then
    kill -TERM -- "-$launched" 2>/dev/null || true # nothing trains yet, or somebody is impatient
  fi
  asked=$1
  touch "$LAUNCH_FOLDER/stop"
}
trap 'ask_to_stop 2' INT
trap 'ask_to_stop 10' USR1
trap 'ask_to_stop 15' TERM

training() { # whether a process that trains is still there, when accelerate may be gone
  local file
  for file in "$LAUNCH_FOLDER"/pid-*; do
    kill -0 "${file##*-}" 2>/dev/null && return
  done
  return 1
}

set -m
# --quiet: a mistake in the configuration is one sentence, without accelerate's own traceback behind it
"${accelerate[@]}" launch --quiet "${options[@]}" "$repo/train/run.py" "$@" &
launched=$!
set +m
while true; do
  code=0
  wait "$launched" || code=$?
  kill -0 "$launched" 2>/dev/null || break # still there: a signal has ended the waiting
done
while training; do sleep 0.2; done
[ -z "$asked" ] || code=$((128 + asked))
exit "$code"
