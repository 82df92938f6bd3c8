#!/usr/bin/env bash
# The runs of README.md beside this file. Finished ones are skipped, so it may be stopped and started again.
#
#   experiments/tuning/study.sh rates SST2 [TUNING...]    learning rates, compared on validation: 2,000 rows, 189 steps
#   experiments/tuning/study.sh sst2 SST2 [TUNING...]     the table's scores of SST-2, 217 steps, seeds 0, 1, 2
#   experiments/tuning/study.sh ner CONLL [TUNING...]     and of CoNLL-2003, 5,000 training sentences, 313 steps, seed 0
#   experiments/tuning/study.sh cost SST2 [TUNING...]     its seconds and memory, on a machine that does nothing else
#
# SST2 and CONLL are folders with train, validation and test.jsonl.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=$1 data=$2
shift 2
declare -A rates=( # tried: twice to three times the one before, until the best is neither the least nor the largest
  [full]=2e-5,5e-5,1e-4,2e-4,4e-4 [head]=3e-4,1e-3,3e-3,1e-2 [bitfit]=5e-4,1e-3,3e-3 [layernorm]=1e-3,3e-3,1e-2
  [lora]=5e-4,1e-3,2e-3,4e-3 [dora]=5e-4,1e-3,2e-3,4e-3 [adalora]=1e-3,2e-3,5e-3,1e-2,2e-2 [qlora]=1e-3,2e-3,4e-3
  [ia3]=3e-3,1e-2,3e-2,1e-1 [adapter]=3e-4,1e-3,3e-3 [adapter_pfeiffer]=3e-4,1e-3,3e-3,1e-2
  [prefix]=3e-4,1e-3,3e-3,1e-2 [prompt]=3e-3,1e-2,3e-2,1e-1
)
declare -A chosen=( # of those the best on validation
  [full]=2e-4 [head]=1e-3 [bitfit]=1e-3 [layernorm]=3e-3 [lora]=2e-3 [dora]=2e-3 [adalora]=1e-2 [qlora]=2e-3
  [ia3]=3e-2 [adapter]=1e-3 [adapter_pfeiffer]=3e-3 [prefix]=1e-3 [prompt]=3e-2
)
declare -A settings=( # the same rank for all that have one; AdaLoRA starts above it and ends at it on average
  [lora]="tuning.rank=8 tuning.alpha=16" [dora]="tuning.rank=8 tuning.alpha=16" [qlora]="tuning.rank=8 tuning.alpha=16"
  [adalora]="tuning.rank=12 tuning.target_rank=8 tuning.alpha=16"
)
study() { # NAME TUNING RATE MORE...
  # shellcheck disable=SC2086
  .venv/bin/python train.py -m study="$1" "tuning=$2" ${settings[$2]:-} "optimizer.lr=$3" data=files \
    data.train="$data/train.jsonl" data.validation="$data/validation.jsonl" data.test="$data/test.jsonl" \
    logger=none measure=scores "${@:4}"
}
if [ $# -eq 0 ]; then
  set -- full head bitfit layernorm lora dora adalora ia3 adapter adapter_pfeiffer prefix prompt qlora
fi
for tuning in "$@"; do
  case $what in
    rates) study "tuning-search-$tuning" "$tuning" "${rates[$tuning]}" seed=0 data.limit=2000 ;;
    sst2) study "tuning-sst2-$tuning" "$tuning" "${chosen[$tuning]}" seed=0,1,2 trainer.max_epochs=1 ;;
    ner) study "tuning-ner-$tuning" "$tuning" "${chosen[$tuning]}" seed=0 task=ner data.limit=5000 \
      data.batch_size=16 trainer.max_epochs=1 ;;
    cost) study "tuning-cost-$tuning" "$tuning" "${chosen[$tuning]}" seed=0 trainer.max_steps=20 data.limit=640 \
      'callbacks=[]' trainer.limit_validation_batches=1 ;;
    *) echo "$what: needs rates, sst2, ner or cost" >&2; exit 2 ;;
  esac
done
