#!/usr/bin/env bash
# The main job, end to end: tiny model, real photographs, two edits, cache, train with both objectives, validate, score, report.
#
#   bash scripts/demo.sh                                                        about 12 minutes on two cores
#   DEMO_DIR=runs/quick DEMO_STEPS=2 DEMO_CROPS=8 bash scripts/demo.sh          the same, reduced
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${DEMO_DIR:-runs/demo}
MODEL=${DEMO_MODEL:-models/tiny}
STEPS=${DEMO_STEPS:-800}
CROPS=${DEMO_CROPS:-400}
HELD_OUT=${DEMO_HELD_OUT:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=passive # accelerate would set 1 thread

settings=(
  model.path="$MODEL" cache.dir="$DIR/cache"
  data.dataset="$DIR/data/train.json" data.validation="$DIR/data/validation.json"
  train.num_steps="$STEPS" train.validate_every="$STEPS" train.save_every="$STEPS" train.log_every=100
  validate.num_rows=$((2 * HELD_OUT))
)
launch() { accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no "$@"; }

[ -f "$MODEL/model_index.json" ] || python scripts/make_tiny_model.py --out "$MODEL"
python scripts/make_demo_data.py --out "$DIR/data" --train "$CROPS" --validation "$HELD_OUT"

launch train/run.py +exp=tiny_lbm run_dir="$DIR/lbm" "${settings[@]}" loss.rollout=0.7
launch train/run.py +exp=tiny_sft run_dir="$DIR/flow" "${settings[@]}"

python eval/run.py --title "The demo's held-out photographs" --model "$MODEL" --adapter "$DIR/lbm" --adapter "$DIR/flow" \
  --dataset "$DIR/data/validation.json" --steps 1,4 --cfg-scale 1 --out "$DIR/evaluation"
python eval/report.py --title "Latent Bridge Matching beside flow matching" --out "$DIR/report.html" "$DIR/lbm" "$DIR/flow"
