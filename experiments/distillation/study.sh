#!/usr/bin/env bash
# The runs of a study of distillation. Finished ones are skipped, so it may be stopped and started again.
#
#   experiments/distillation/study.sh stories STORIES260K TEXT  three of five blocks; TEXT holds train, validation, test.txt
#   experiments/distillation/study.sh g2p G2P WORDS             sequence-level distillation of a BART that spells words
#   experiments/distillation/study.sh g2p_t5 G2P WORDS          the same with a T5 that is trained first
#   experiments/distillation/study.sh teacher SST2              the model that teaches `students`
#   experiments/distillation/study.sh students SST2             three and two of its six blocks, by each method
#   experiments/distillation/study.sh ner CONLL                 a teacher of names and three of its blocks, by each method
#   experiments/distillation/study.sh combined SST2             LoRA, 90% zeros and 8 bits: at once, and one after the other
#   experiments/distillation/study.sh speed SST2                the clock and the file of three and two blocks
#   experiments/distillation/study.sh cache SST2                a step with the teacher's answers kept, asked for, and without
#
# SST2, CONLL and WORDS are folders with train, validation and test.jsonl. `speed` and `cache` take time: let nothing run
# beside them.
set -euo pipefail
what=${1:-} data=${*: -1}
[ ! -d "$data" ] || data=$(realpath "$data")
[ $# -lt 3 ] || model=$(realpath "$2")
cd "$(dirname "$0")/../.."
sweep() { # ENDING STUDY MORE...: no best step is kept, so validation within a fit would tell nothing
  .venv/bin/python train.py -m study="$2" data=files "data.train=$data/train.$1" "data.validation=$data/validation.$1" \
    "data.test=$data/test.$1" logger=none measure=scores 'callbacks=[]' trainer.limit_validation_batches=1 "${@:3}"
}
stories() { # STUDY TERM MORE...
  sweep txt "distillation-stories-$1" task=causal_lm model=pretrained model.name="$model" task.max_length=512 \
    "compression=[prune/layers$2]" compression.prune_layers.by=list 'compression.prune_layers.blocks=[0,2,4]' \
    trainer.max_epochs=10 optimizer.lr=1e-3 seed=0 "${@:3}"
}
words() { # STUDY MORE...
  sweep jsonl "distillation-$1" task=translation model=pretrained task.max_length=64 task.max_target_length=64 \
    optimizer.lr=1e-3 "${@:2}"
}
student() { # STUDY METHODS MORE...: of what `model` names
  words "$1" "model.name=$model" "compression=[$2]" trainer.max_epochs=5 seed=0,1 "${@:3}"
}
three_ways() { # STUDY CUT MORE...: the student's cut, and its settings
  student "$1-alone" "$2" "${@:3}"
  student "$1-sequence" "$2,distill/sequence" compression.sequence.teacher="$model" "${@:3}"
  student "$1-both" "$2,distill/sequence,distill/logits" compression.sequence.teacher="$model" "${@:3}"
}
teacher=logs/distillation-teacher/run/model task=(optimizer.lr=1e-4)
cut() { # STUDY BLOCKS SEEDS METHODS MORE...: blocks of the teacher
  sweep jsonl "distillation-$1" model=pretrained model.name=$teacher "${task[@]}" "compression=[prune/layers$4]" \
    compression.prune_layers.by=list "compression.prune_layers.blocks=$2" trainer.max_epochs=6 "seed=$3" "${@:5}"
}
all_methods() { # STUDY BLOCKS SEEDS
  cut "$1-none" "$2" "$3" ""
  cut "$1-logits" "$2" "$3" ,distill/logits compression.logits.teacher=$teacher compression.logits.cache=true
  cut "$1-hidden" "$2" "$3" ,distill/hidden,distill/logits compression.logits.teacher=$teacher
  cut "$1-minilm" "$2" "$3" ,distill/minilm compression.minilm.teacher=$teacher
  cut "$1-pkd" "$2" "$3" ,distill/pkd,distill/logits compression.logits.teacher=$teacher
  cut "$1-tinybert" "$2" "$3" ,distill/hidden,distill/attention compression.hidden.teacher=$teacher task_weight=0
  for seed in ${3//,/ }; do # the second stage goes on from the first
    first=logs/distillation-$1-tinybert/seed=$seed/model
    [[ $3 == *,* ]] || first=logs/distillation-$1-tinybert/run/model
    sweep jsonl "distillation-$1-tinybert-answers-$seed" model=pretrained "model.name='$first'" "${task[@]}" \
      compression=distill/logits compression.logits.teacher=$teacher compression.logits.temperature=1 \
      compression.logits.cache=true task_weight=0 trainer.max_epochs=6 "seed=$seed"
  done
}
combined() { # STUDY TUNING LR METHODS MORE...: a pretrained model becomes all of it in one run
  sweep jsonl "distillation-combined-$1" "tuning=$2" "optimizer.lr=$3" "compression=[prune/movement,quantize/qat$4]" \
    compression.movement.sparsity=0.9 compression.movement.start=magnitude trainer.max_epochs=6 seed=0,1 "${@:5}"
}
one_after_the_other() {
  sweep jsonl distillation-after-tuned tuning=lora optimizer.lr=2e-3 seed=0,1
  for seed in 0 1; do
    tuned=logs/distillation-after-tuned/seed=$seed/model
    after "$seed" "" ""
    after "$seed" -distilled ,distill/logits,distill/hidden compression.logits.teacher=$teacher
  done
}
after() { # SEED ENDING METHODS MORE...: the second and the third step
  sweep jsonl "distillation-after-pruned$2-$1" model=pretrained "model.name='$tuned'" tuning=lora optimizer.lr=2e-3 \
    "compression=[prune/movement$3]" compression.movement.sparsity=0.9 compression.movement.start=magnitude \
    trainer.max_epochs=6 "seed=$1" "${@:4}"
  sweep jsonl "distillation-after-quantized$2-$1" model=pretrained \
    "model.name=logs/distillation-after-pruned$2-$1/run/model" compression=quantize/int8 trainer.max_epochs=0 "seed=$1"
}
case $what in
  stories)
    stories alone ""
    for divergence in forward_kl reverse_kl skewed_kl; do
      stories "$divergence" ,distill/logits compression.logits.teacher="$model" compression.logits.temperature=1 \
        "compression.logits.divergence=$divergence"
    done
    stories on-policy ,distill/on_policy compression.on_policy.teacher="$model"
    ;;
  g2p)
    words g2p-teacher model.name="$model" trainer.max_epochs=0 seed=0
    three_ways g2p prune/neurons compression.neurons.ratio=0.9375
    ;;
  g2p_t5)
    start=logs/distillation-t5-start
    [ -d $start ] || .venv/bin/python experiments/distillation/small_t5.py "$model" $start
    words t5-teacher model.name=$start trainer.max_epochs=20 seed=0
    model=$PWD/logs/distillation-t5-teacher/run/model
    three_ways t5 prune/layers compression.prune_layers.by=list 'compression.prune_layers.blocks=[0]'
    ;;
  teacher) sweep jsonl distillation-teacher optimizer.lr=1e-4 seed=0 ;;
  students)
    all_methods three '[1,3,5]' 0,1,2
    all_methods two '[2,5]' 0
    ;;
  ner)
    teacher=logs/distillation-ner-teacher/run/model task=(task=ner data.limit=5000 optimizer.lr=2e-4)
    sweep jsonl distillation-ner-teacher "${task[@]}" seed=0
    all_methods ner '[1,3,5]' 0
    ;;
  speed)
    for blocks in '[1,3,5]' '[2,5]'; do
      cut "speed-${blocks//[^0-9]/}" "$blocks" 0 "" trainer.max_epochs=0 measure=full
    done
    ;;
  cache) .venv/bin/python experiments/distillation/cache.py $teacher "$data" ;;
  combined)
    taught=(compression.logits.teacher=$teacher)
    combined without lora 2e-3 ""
    combined distilled lora 2e-3 ,distill/logits,distill/hidden "${taught[@]}"
    one_after_the_other
    combined full full 1e-4 ,distill/logits,distill/hidden "${taught[@]}"
    ;;
  *)
    echo "$what: needs stories, g2p, g2p_t5, teacher, students, ner, speed, cache or combined" >&2
    exit 2
    ;;
esac
