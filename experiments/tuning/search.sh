#!/usr/bin/env bash
# Learning rates of the tunings, compared on the validation split of SST-2: 2,000 training rows, 3 epochs, seed 0.
#
#   experiments/tuning/search.sh SST2_FOLDER [TUNING...]     SST2_FOLDER holds train, validation and test.jsonl
#
# Finished points are skipped, so it may be stopped and run again. Then:
#   niwaki report logs/tuning-search-* --rows tuning,optimizer.lr --metrics validation.accuracy
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1
shift
declare -A rates=(
  [full]=2e-5,5e-5,1e-4,2e-4 [head]=1e-3,3e-3,1e-2 [bitfit]=5e-4,1e-3,3e-3 [layernorm]=1e-3,3e-3,1e-2
  [lora]=5e-4,1e-3,2e-3,4e-3 [dora]=5e-4,1e-3,2e-3,4e-3 [adalora]=1e-3,2e-3,5e-3,1e-2 [qlora]=5e-4,1e-3,2e-3,4e-3
  [ia3]=3e-3,1e-2,3e-2 [adapter]=3e-4,1e-3,3e-3 [adapter_pfeiffer]=3e-4,1e-3,3e-3,1e-2
  [prefix]=1e-3,3e-3,1e-2 [prompt]=3e-3,1e-2,3e-2
)
declare -A settings=( # the same rank for all that have one; AdaLoRA starts above it and ends at it on average
  [lora]="tuning.rank=8 tuning.alpha=16" [dora]="tuning.rank=8 tuning.alpha=16" [qlora]="tuning.rank=8 tuning.alpha=16"
  [adalora]="tuning.rank=12 tuning.target_rank=8 tuning.alpha=16"
)
for tuning in "${@:-full head bitfit layernorm lora dora adalora ia3 adapter adapter_pfeiffer prefix prompt qlora}"; do
  for one in $tuning; do
    # shellcheck disable=SC2086
    .venv/bin/python train.py -m study="tuning-search-$one" seed=0 data=files data.limit=2000 \
      data.train="$data/train.jsonl" data.validation="$data/validation.jsonl" data.test="$data/test.jsonl" \
      logger=none measure=scores "tuning=$one" ${settings[$one]:-} "optimizer.lr=${rates[$one]}"
  done
done
