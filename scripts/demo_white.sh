#!/usr/bin/env bash
# Trains only the stream of Latent Bridge Matching that starts from white: products on white, with pairs made by synth.
#
#   bash scripts/demo_white.sh                                                  about 3 minutes on two cores
#   DEMO_DIR=runs/quick DEMO_STEPS=2 DEMO_PAIRS=1 bash scripts/demo_white.sh    the same, reduced
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${DEMO_DIR:-runs/demo-white}
MODEL=${DEMO_MODEL:-models/tiny}
STEPS=${DEMO_STEPS:-300}
PAIRS=${DEMO_PAIRS:-24} # of each photograph
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=passive

[ -f "$MODEL/model_index.json" ] || python scripts/make_tiny_model.py --out "$MODEL"
python scripts/make_demo_data.py --out "$DIR" --products 64
make_pairs() { # SPLIT, pairs of each photograph
  python data_prep/run.py synth --images "$DIR/$1/photographs" --objects "$DIR/$1/products" --out "$DIR/$1/pairs" \
    --recipes cutout --per-image "$2" --size 128 --validation 0
}
make_pairs train "$PAIRS"
make_pairs validation 4
python train/run.py +exp=tiny_lbm run_dir="$DIR/lbm" model.path="$MODEL" cache.dir="$DIR/cache" \
  data.dataset="$DIR/train/pairs/dataset.jsonl" data.validation="$DIR/validation/pairs/dataset.jsonl" \
  loss=lbm loss.sub_prob=1 loss.rollout=0.7 optim.lr=6e-3 train.max_grad_norm=1 \
  train.num_steps="$STEPS" train.validate_every="$STEPS" train.save_every="$STEPS" train.log_every=100
