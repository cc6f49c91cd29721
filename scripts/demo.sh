#!/usr/bin/env bash
# The main job, end to end: tiny model, real photographs, two edits, cache, train with both objectives, validate, score, report.
#
#   bash scripts/demo.sh                                                        one seed: about 8 minutes on two cores
#   DEMO_SEEDS=2 bash scripts/demo.sh                                           two seeds, as in the README's table
#   DEMO_SELECTION=1 bash scripts/demo.sh optim.lr=3e-3                         to choose settings: validates on two training photographs
#   DEMO_DIR=runs/quick DEMO_STEPS=2 DEMO_CROPS=8 bash scripts/demo.sh          the same, reduced
#
# Arguments are passed to both trainings, which run side by side with one thread each.
set -euo pipefail
cd "$(dirname "$0")/.."

SELECTION=${DEMO_SELECTION:+--selection}
DIR=${DEMO_DIR:-runs/demo${SELECTION:+-selection}}
MODEL=${DEMO_MODEL:-models/tiny}
STEPS=${DEMO_STEPS:-800}
CROPS=${DEMO_CROPS:-400}
HELD_OUT=${DEMO_HELD_OUT:-8}
SEEDS=${DEMO_SEEDS:-1}
export OMP_NUM_THREADS=1

settings=(
  model.path="$MODEL" cache.dir="$DIR/cache"
  data.dataset="$DIR/data/train.json" data.validation="$DIR/data/validation.json"
  train.num_steps="$STEPS" train.validate_every="$STEPS" train.save_every="$STEPS" train.log_every=100
  validate.num_rows=$((2 * HELD_OUT))
  optim.lr=6e-3 train.max_grad_norm=1 "$@"
)
bridge=(+exp=tiny_lbm loss.sub_prob=0 loss.rollout=0.7)
flow=(+exp=tiny_sft 'validate.steps=[1,4,20]')

[ -f "$MODEL/model_index.json" ] || python scripts/make_tiny_model.py --out "$MODEL"
python scripts/make_demo_data.py --out "$DIR/data" --train "$CROPS" --validation "$HELD_OUT" ${SELECTION:+"$SELECTION"}
accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no \
  train/run.py "${bridge[@]}" run_dir="$DIR/lbm" "${settings[@]}" 'phases=[cache]'

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # what still trains when this script ends
runs=()
for ((seed = 0; seed < SEEDS; seed++)); do
  pair=("$DIR/lbm" "$DIR/flow")
  if ((seed)); then pair=("${pair[@]/%/-$seed}"); fi
  python train/run.py "${bridge[@]}" run_dir="${pair[0]}" "${settings[@]}" seed="$seed" 'phases=[train]' > >(sed -u 's/^/LBM   /') 2>&1 &
  first=$!
  python train/run.py "${flow[@]}" run_dir="${pair[1]}" "${settings[@]}" seed="$seed" 'phases=[train]' > >(sed -u 's/^/flow  /') 2>&1 &
  second=$!
  wait "$first"
  wait "$second"
  runs+=("${pair[@]}")
done

python eval/run.py --title "The demo's held-out photographs" --model "$MODEL" "${runs[@]/#/--adapter=}" --base \
  --dataset "$DIR/data/validation.json" --steps 1,2,4,20 --cfg-scale 1 --batch-size 8 --out "$DIR/evaluation"
python eval/run.py --title "Latent Bridge Matching beside flow matching" "${runs[@]/#/--runs=}" --out "$DIR"
python scripts/demo_table.py --evaluation "$DIR/evaluation" --model "$MODEL"
