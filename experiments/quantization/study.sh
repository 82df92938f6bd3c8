#!/usr/bin/env bash
# The runs of README.md beside this file. Finished ones are skipped, so it may be stopped and started again.
#
#   experiments/quantization/study.sh stories STORIES260K TEXT  8 to 2 bits, chosen once; TEXT holds train, validation, test.txt
#   experiments/quantization/study.sh trained STORIES260K TEXT  8 to 2 bits in the fit, with LoRA and without
#   experiments/quantization/study.sh dense SST2                the models that the others start from
#   experiments/quantization/study.sh after SST2                8 and 4 bits after the fit
#   experiments/quantization/study.sh aware SST2                8 and 4 bits in the fit
#   experiments/quantization/study.sh signs SST2                ternary weights with distillation
#   experiments/quantization/study.sh ner CONLL                 all of these for names
#   experiments/quantization/study.sh composed SST2             2:4, LoRA and 8 bits in one run
#   experiments/quantization/study.sh small SST2                fewer blocks, heads and neurons, and 8 bits, in one run
#   experiments/quantization/study.sh speed SST2                the clock of these; let nothing run beside it
#
# SST2 and CONLL are folders with train, validation and test.jsonl. Each run on them is exported to ONNX and scored there.
set -euo pipefail
what=${1:-} data=${*: -1}
[ ! -d "$data" ] || data=$(realpath "$data")
[ $# -lt 3 ] || model=$(realpath "$2")
cd "$(dirname "$0")/../.."
sweep() { # ENDING STUDY MORE...: no best step is kept, so validation within a fit would tell nothing
  .venv/bin/python train.py -m study="quantization-$2" data=files "data.train=$data/train.$1" \
    "data.validation=$data/validation.$1" "data.test=$data/test.$1" logger=none measure=scores 'callbacks=[]' \
    trainer.limit_validation_batches=1 "${@:3}"
}
stories() { # STUDY COMPRESSION MORE...
  sweep txt "stories-$1" task=causal_lm model=pretrained model.name="$model" task.max_length=512 "compression=[$2]" "${@:3}"
}
divided="[query,key,value,output,feed_in,feed_gate]" # groups of 32 do not divide the 172 inputs of feed_out
chosen() { # METHOD BITS MORE...
  stories "$1-$2$4" "quantize/$1" "compression.$1.bits=$2" "compression.$1.group=32" "compression.$1.targets=$divided" \
    trainer.max_epochs=0 "seed=$3" "${@:5}"
}
fitted() { # BITS MORE...
  stories "qat-$1" quantize/qat "compression.qat.bits=$1" compression.qat.group=32 compression.qat.activation_bits=null \
    "compression.qat.targets=$divided" trainer.max_epochs=5 optimizer.lr=5e-4 seed=0
  stories "qat-lora-$1" quantize/qat "compression.qat.bits=$1" compression.qat.group=32 \
    compression.qat.activation_bits=null "compression.qat.targets=$divided" trainer.max_epochs=5 tuning=lora \
    optimizer.lr=5e-3 seed=0
}
rows() { # STUDY COMPRESSION SEED MORE...
  sweep jsonl "$1" "compression=[$2]" "seed=$3" "export=[$exports]" "${task[@]}" "${@:4}"
}
dense=logs/quantization-dense seeds="0 1 2" task=(optimizer.lr=1e-4) exports=onnx
start() { # SEED: the tuned model of that seed
  echo "model.name='$dense/seed=$1/model'"
}
after() { # STUDY METHOD MORE...: of every tuned model
  for seed in $seeds; do
    rows "$1-$seed" "quantize/$2" "$seed" model=pretrained "$(start "$seed")" trainer.max_epochs=0 "${@:3}"
  done
}
aware() { # STUDY SEEDS MORE...
  rows "$1" quantize/qat "$2" "${@:3}"
}
four=(compression.qat.bits=4 compression.qat.group=32 compression.qat.activation_bits=null)
signs() { # STUDY
  for seed in $seeds; do
    rows "$1-$seed" quantize/ternary,distill/logits,distill/hidden "$seed" model=pretrained "$(start "$seed")" \
      "compression.logits.teacher='$dense/seed=$seed/model'" trainer.max_epochs=6
  done
}
all_after() { # PREFIX
  after "$1int8" int8
  for range in min_max percentile mse; do
    after "$1int8_static-$range" int8_static compression.int8_static.range=$range
  done
  after "$1weight_only" weight_only compression.weight_only.bits=4 compression.weight_only.group=32
  after "$1gptq" gptq
  after "$1awq" awq
}
small() { # NAME-TUNING BLOCKS CUTS RATIO TERMS EPOCHS
  local cuts=${3:+,prune/${3//,/,prune/}} terms=,distill/${5//,/,distill/} more=()
  for cut in ${3//,/ }; do
    more+=("compression.$cut.ratio=$4" "compression.$cut.importance=taylor")
  done
  task=(optimizer.lr=1e-4)
  [ "${1##*-}" = full ] || task=(optimizer.lr=2e-3)
  rows "$1" "prune/layers$cuts,quantize/qat$terms" 0 model=pretrained "$(start 0)" "tuning=${1##*-}" \
    compression.prune_layers.by=list "compression.prune_layers.blocks=$2" "${more[@]}" \
    "compression.logits.teacher=$teacher" "trainer.max_epochs=$6"
}
case $what in
  stories)
    stories dense "" trainer.max_epochs=0 seed=0
    for bits in 8 4 3 2; do
      for method in weight_only hqq awq gptq; do
        chosen $method $bits 0 ""
      done
      for method in weight_only awq gptq; do
        chosen $method $bits 0 -zero compression.$method.symmetric=false
      done
    done
    for seed in 1 2; do # other rows to calibrate on
      chosen awq 3 $seed "-$seed"
      chosen gptq 3 $seed "-$seed"
    done
    chosen gptq 3 0 -order compression.gptq.act_order=true
    ;;
  trained)
    stories tuned "" trainer.max_epochs=5 optimizer.lr=5e-4 seed=0
    for bits in 4 3 2 8; do fitted $bits; done
    ;;
  dense) rows dense "" 0,1,2 ;;
  after) all_after "" ;;
  aware)
    aware qat-8 0,1,2
    aware qat-4 0,1,2 "${four[@]}"
    ;;
  signs) signs ternary ;;
  ner)
    dense=logs/quantization-ner-dense seeds=0 task=(task=ner data.limit=5000 optimizer.lr=2e-4)
    start() { echo "model.name=$dense/run/model"; }
    rows ner-dense "" 0
    all_after ner-
    aware ner-qat-8 0
    aware ner-qat-4 0 "${four[@]}"
    rows ner-ternary quantize/ternary,distill/logits,distill/hidden 0 model=pretrained model.name=$dense/run/model \
      compression.logits.teacher=$dense/run/model trainer.max_epochs=6
    ;;
  composed)
    rows composed prune/magnitude,quantize/int8 0 tuning=lora optimizer.lr=2e-3 "compression.magnitude.pattern='2:4'"
    ;;
  small)
    teacher="'$dense/seed=0/model'" exports=onnx,onnx_int8
    small small-lora '[1,3,5]' neurons,heads 0.5 logits,hidden 6
    small small-full '[1,3,5]' neurons,heads 0.5 logits,hidden 6
    small wide-lora '[1,3,5]' neurons 0.5 logits,hidden 6
    small thin-lora '[1,3,5]' neurons 0.5 logits,minilm 12
    small two-lora '[2,5]' "" "" logits,hidden,attention 12
    small two-full '[2,5]' "" "" logits,hidden,attention 12
    small quarter-lora '[1,3,5]' neurons 0.25 logits,hidden,attention 12
    ;;
  speed)
    for run in dense/seed=0 int8-0/run int8_static-min_max-0/run qat-8/seed=0 weight_only-0/run gptq-0/run qat-4/seed=0 \
      ternary-0/run quarter-lora/run; do
      .venv/bin/niwaki speed "logs/quantization-$run"
    done
    ;;
  *)
    echo "$what: needs stories, trained, dense, after, aware, signs, ner, composed, small or speed" >&2
    exit 2
    ;;
esac
