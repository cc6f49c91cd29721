#!/usr/bin/env bash
# Caches and trains +exp=sft_2509. Everything else is passed on:
#
#   WANDB_PROJECT=edits WANDB_NAME=first bash scripts/train_sft_2509.sh data.dataset=pairs.json data.root=photos run_dir=runs/mine
#
# NPROC: processes on this machine (default 1).
set -euo pipefail
cd "$(dirname "$0")/.."
exec accelerate launch --num_processes "${NPROC:-1}" train/run.py +exp=sft_2509 "$@"
