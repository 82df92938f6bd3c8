#!/usr/bin/env bash
# The runs of README.md beside this file. Finished ones are skipped, so it may be stopped and started again.
#
#   experiments/pruning/study.sh oneshot STORIES260K TEXT     masks without training; TEXT holds train, validation, test.txt
set -euo pipefail
cd "$(dirname "$0")/../.."
what=$1 model=$2 data=$3
[ "$what" = oneshot ] || { echo "$what: needs oneshot" >&2; exit 2; }
study() {
  .venv/bin/python train.py -m study="$1" task=causal_lm model=pretrained model.name="$model" data=files \
    data.train="$data/train.txt" data.validation="$data/validation.txt" data.test="$data/test.txt" \
    task.max_length=512 trainer.max_epochs=0 logger=none measure=scores "${@:2}"
}
study pruning-oneshot seed=0,1 'compression=[]'
for score in magnitude wanda sparsegpt; do
  study "pruning-oneshot-$score" "compression=[prune/$score]" seed=0,1,2 "compression.$score.sparsity=0.5,0.6,0.7"
  study "pruning-oneshot-$score-2-4" "compression=[prune/$score]" seed=0,1,2 "compression.$score.pattern='2:4'"
  # 8 does not divide the 172 inputs of feed_out, which stays dense
  study "pruning-oneshot-$score-4-8" "compression=[prune/$score]" seed=0,1,2 "compression.$score.pattern='4:8'" \
    "compression.$score.targets=[query,key,value,output,feed_in,feed_gate]"
done
