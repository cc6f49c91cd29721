#!/usr/bin/env bash
# Flow matching on Qwen-Image-Edit-2511. Caches and trains; what follows is passed on:
#
#   WANDB_PROJECT=edits WANDB_NAME=first bash scripts/train_sft_2511.sh data.dataset=pairs.json data.root=photos run_dir=runs/mine
#
# NPROC (by default every GPU) and the other variables: scripts/launch.sh
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.sh" +exp=sft_2511 "$@"
