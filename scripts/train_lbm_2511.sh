#!/usr/bin/env bash
# Latent Bridge Matching on Qwen-Image-Edit-2511. Caches and trains; all arguments are passed on to train/run.py:
#
#   WANDB_PROJECT=edits WANDB_NAME=first bash scripts/train_lbm_2511.sh data.dataset=pairs.json data.root=photos run_dir=runs/mine
#
# scripts/launch.sh explains NPROC (by default every GPU) and the other variables.
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh" +exp=lbm_2511 "$@"
