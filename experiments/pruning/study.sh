#!/usr/bin/env bash
# The runs of README.md beside this file. Finished ones are skipped, so it may be stopped and started again.
#
#   experiments/pruning/study.sh oneshot STORIES260K TEXT  masks without training; TEXT holds train, validation, test.txt
#   experiments/pruning/study.sh dense SST2                the dense model that the others learn from and start from
#   experiments/pruning/study.sh movement SST2             magnitude, movement and soft movement, with distillation
#   experiments/pruning/study.sh structured SST2           heads and neurons to 50% and 25%, with distillation
#   experiments/pruning/study.sh speed SST2                the same shapes and the dense model, timed in turns
#   experiments/pruning/study.sh codebook SST2             90% zeros and a 4-bit codebook
#   experiments/pruning/study.sh vocabulary SST2           only the tokens that the data uses
#
# SST2 is a folder with train, validation and test.jsonl. `speed` times the models: let nothing else run beside it.
set -euo pipefail
what=${1:-} data=${*: -1}
[ ! -d "$data" ] || data=$(realpath "$data")
[ "$what" != oneshot ] || model=$(realpath "$2")
cd "$(dirname "$0")/../.."
files() {
  printf '%s\n' data=files "data.train=$data/train.$1" "data.validation=$data/validation.$1" "data.test=$data/test.$1"
}
stories() { # STUDY MORE...
  mapfile -t where < <(files txt)
  .venv/bin/python train.py -m study="$1" task=causal_lm model=pretrained model.name="$model" "${where[@]}" \
    task.max_length=512 trainer.max_epochs=0 logger=none measure=scores "${@:2}"
}
sst2() { # STUDY MORE...
  mapfile -t where < <(files jsonl)
  .venv/bin/python train.py -m study="$1" "${where[@]}" logger=none "${@:2}"
}
dense=logs/pruning-dense/run/model
from_dense() { # STUDY COMPRESSION MORE...: goes on from the dense model, which teaches it too
  sst2 "$1" model=pretrained model.name=$dense "compression=[$2,distill/logits]" compression.logits.teacher=$dense \
    compression.logits.cache=true optimizer.lr=1e-4 trainer.max_epochs=6 'callbacks=[]' "${@:3}"
}
case $what in
  oneshot)
    stories pruning-oneshot seed=0 'compression=[]'
    divided="[query,key,value,output,feed_in,feed_gate]" # 8 does not divide the 172 inputs of feed_out
    for score in magnitude wanda sparsegpt; do
      seeds=0,1,2 # of the calibration rows
      [ $score != magnitude ] || seeds=0 # which calibrates nothing
      stories "pruning-oneshot-$score" "compression=[prune/$score]" seed=$seeds "compression.$score.sparsity=0.5,0.6,0.7"
      stories "pruning-oneshot-$score-2-4" "compression=[prune/$score]" seed=$seeds "compression.$score.pattern='2:4'"
      stories "pruning-oneshot-$score-divided" "compression=[prune/$score]" seed=$seeds \
        "compression.$score.pattern='2:4','4:8'" "compression.$score.targets=$divided"
    done
    ;;
  dense) sst2 pruning-dense optimizer.lr=1e-4 seed=0 'callbacks=[]' ;;
  movement)
    for sparsity in 0.5 0.9 0.97; do
      from_dense "pruning-magnitude-$sparsity" prune/magnitude compression.magnitude.sparsity=$sparsity \
        compression.magnitude.schedule=cubic compression.magnitude.begin=0.1 compression.magnitude.end=0.8 \
        compression.magnitude.interval=1 seed=0,1 measure=scores
      for start in zero magnitude; do
        from_dense "pruning-movement-$start-$sparsity" prune/movement compression.movement.sparsity=$sparsity \
          compression.movement.start=$start seed=0,1 measure=scores
      done
    done
    # the sparsity follows from the penalty: the table has what was reached
    from_dense pruning-soft-movement prune/soft_movement compression.soft_movement.penalty=10,100,250,400,2500,4000,10000 \
      seed=0,1 measure=scores
    ;;
  structured)
    for ratio in 0.5 0.75; do
      from_dense "pruning-structured-$ratio" prune/heads,prune/neurons compression.heads.ratio=$ratio \
        compression.neurons.ratio=$ratio compression.heads.importance=taylor compression.neurons.importance=taylor seed=0 \
        measure=scores
    done
    ;;
  speed)
    for ratio in 0.5 0.75; do
      sst2 "pruning-speed-$ratio" model=pretrained model.name=$dense 'compression=[prune/heads,prune/neurons]' \
        compression.heads.ratio=$ratio compression.neurons.ratio=$ratio trainer.max_epochs=0 seed=0
    done
    ;;
  codebook)
    from_dense pruning-codebook prune/magnitude,share/codebook compression.magnitude.sparsity=0.9 \
      compression.magnitude.schedule=cubic compression.codebook.begin=0.7 seed=0 measure=scores
    ;;
  vocabulary)
    for splits in train train,validation,test; do
      sst2 "pruning-vocabulary-${splits//,/-}" model=pretrained model.name=$dense compression=prune/vocabulary \
        "compression.vocabulary.splits=[$splits]" trainer.max_epochs=0 seed=0 measure=full measure.repeats=0
    done
    answers=$(mktemp -d)
    for run in pruning-dense pruning-vocabulary-train pruning-vocabulary-train-validation-test; do
      .venv/bin/niwaki predict "logs/$run/run" --file "$data/test.jsonl" |
        .venv/bin/python -c 'import json, sys; [print(json.loads(line)["label"]) for line in sys.stdin]' > "$answers/$run"
    done
    for run in pruning-vocabulary-train pruning-vocabulary-train-validation-test; do
      other=$(diff -y --suppress-common-lines "$answers/pruning-dense" "$answers/$run" | wc -l)
      echo "$run: $other of $(wc -l < "$answers/$run") answers differ from those of the dense model"
    done
    ;;
  *)
    echo "$what: needs oneshot, dense, movement, structured, speed, codebook or vocabulary" >&2
    exit 2
    ;;
esac
