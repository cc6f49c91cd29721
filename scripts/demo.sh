#!/usr/bin/env bash
# The main job, end to end: tiny model, real photographs, two edits, cache, train with both objectives, validate, report.
#
#   bash scripts/demo.sh                       about 8 minutes on two cores
#   DEMO_STEPS=2 DEMO_CROPS=8 DEMO_DIR=/tmp/x bash scripts/demo.sh     the same, reduced
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=${DEMO_DIR:-runs/demo}
STEPS=${DEMO_STEPS:-400}
CROPS=${DEMO_CROPS:-300}
HELD_OUT=${DEMO_HELD_OUT:-8}
data=(data.dataset="$DIR/data/train.json" data.validation="$DIR/data/validation.json" cache.dir="$DIR/cache")
train=(train.num_steps="$STEPS" train.validate_every="$STEPS" train.save_every="$STEPS" validate.num_rows=$((2 * HELD_OUT)))

[ -f models/tiny/model_index.json ] || python scripts/make_tiny_model.py
python scripts/make_demo_data.py --out "$DIR/data" --train "$CROPS" --validation "$HELD_OUT"

accelerate launch train/run.py +exp=tiny_lbm name=lbm run_dir="$DIR/lbm" "${data[@]}" "${train[@]}" 'validate.steps=[1,2,4]'
accelerate launch train/run.py +exp=tiny_sft name=flow run_dir="$DIR/flow" "${data[@]}" "${train[@]}" 'validate.steps=[4,20]'

python eval/report.py --title "Latent Bridge Matching beside flow matching" --out "$DIR/report.html" "$DIR/lbm" "$DIR/flow"
