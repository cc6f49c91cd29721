#!/usr/bin/env bash
# Flow matching on Qwen-Image-Edit-2509. Caches and trains; all arguments are passed on to train/run.py:
#
#   WANDB_PROJECT=edits WANDB_NAME=first bash scripts/train_sft_2509.sh data.dataset=pairs.json data.root=photos run_dir=runs/mine
#
# scripts/launch.sh explains NPROC (by default every GPU) and the other variables.
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh" +exp=sft_2509 "$@"
