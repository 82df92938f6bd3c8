#!/usr/bin/env bash
# The runs of README.md beside this file. Finished ones are skipped, so it may be stopped and started again.
#
#   experiments/tasks/study.sh all DATA             a run for each data set, with the settings that its task starts with
#   experiments/tasks/study.sh one DATA NAME        one of them
#   experiments/tasks/study.sh names DATA           names in news: full precision, and 8 bits in the fit
#   experiments/tasks/study.sh shots DATA           0 to 32 rows of each class, three heads, five seeds, two data sets
#   experiments/tasks/study.sh pretraining DATA     a small model on raw text first, or not
#
# DATA has a folder KIND/NAME for each data set, with train, validation and test.jsonl (.txt for raw text).
# BART and LLAMA may name folders of models that write.
set -euo pipefail
what=${1:-} data=$(realpath "${2:-.}") only=${3:-}
cd "$(dirname "$0")/../.."
bart=${BART:-} llama=${LLAMA:-}
run() { # STUDY FOLDER ENDING MORE...
  local test=$data/$2/test.$3
  .venv/bin/python train.py -m study="tasks-$1" data=files "data.train=$data/$2/train.$3" \
    "data.validation=$data/$2/validation.$3" "data.test=$test" logger=none measure=scores 'callbacks=[]' \
    trainer.limit_validation_batches=1 "${@:4}"
}
rows() { # NAME FOLDER MORE...: where none is named, all
  [ -n "$only" ] && [ "$only" != "$1" ] || run "$1" "$2" jsonl "${@:3}"
}
writes() { # NAME FOLDER MODEL MORE...
  [ -z "$3" ] || rows "$1" "$2" model=pretrained "model.name=$3" "${@:4}"
}
all() { # as many rows as take five minutes on two cores
  rows sst2 sentiment/sst2_sentence data.limit=3000
  rows sst5 sentiment/sst2_sentence/fine data.limit=3000
  rows ag_news topic/ag_news data.limit=2000
  rows banking77 intent/banking77 data.limit=3000 trainer.max_epochs=5
  rows cola sentence_pair/cola data.limit=5000
  rows mrpc sentence_pair/mrpc data.limit=1600
  rows rte sentence_pair/rte data.limit=1400
  rows qnli sentence_pair/qnli data.limit=1600
  rows stsb sentence_pair/stsb task=regression data.limit=2500
  rows financial_phrasebank finance/financial_phrasebank data.limit=2000
  rows fiqa finance/fiqa_sa task=regression trainer.max_epochs=10
  rows conll2003 ner/conll2003 task=ner data.limit=3000
  rows cluener ner/cluener task=ner data.limit=1500
  rows semeval2010_task8 relation_extraction/semeval2010_task8 task=relation data.limit=1200
  rows squad question_answering/squad_v2_half_dev task=question_answering data.limit=400
  rows cmrc2018 question_answering/cmrc2018 task=question_answering task.language=zh data.limit=150
  rows commonsense_qa commonsense/commonsense_qa task=multiple_choice data.limit=600
  rows arc_easy commonsense/arc_easy task=multiple_choice data.limit=500
  rows copa commonsense/copa task=multiple_choice
  rows piqa commonsense/piqa task=multiple_choice data.limit=800
  rows movielens recommendation/movielens_small task=retrieval data.limit=1000
  rows afqmc chinese/afqmc data.limit=3000
  rows chnsenticorp chinese/chnsenticorp data.limit=800
  rows tnews chinese/tnews_fewclue trainer.max_epochs=10
  writes g2p translation/g2p_lexicon_us "$bart" task=translation data.limit=300
  writes samsum summarization/samsum "$llama" task=summarization data.limit=200
  writes dailydialog dialogue/dailydialog "$llama" task=dialogue data.limit=300
  writes e2e table_to_text/e2e_nlg "$llama" task=table_to_text data.limit=300
  writes mbpp code_generation/mbpp "$llama" task=code_generation data.limit=100
}
names() {
  local common=(task=ner task.casing=true trainer.max_epochs=6 optimizer.lr=2e-4 optimizer.layer_decay=0.9)
  run names-dense ner/conll2003 jsonl "${common[@]}"
  run names-qat ner/conll2003 jsonl "${common[@]}" compression=quantize/qat
}
shots() {
  for set in topic/ag_news intent/banking77; do
    run "shots-${set#*/}" "$set" jsonl data.limit=2000 'seed=0,1,2,3,4' 'data.shots=4,8,16,32' \
      'task.head=linear,label_embedding,contrastive' trainer.max_steps=200
    run "zero-${set#*/}" "$set" jsonl data.shots=0 task.head=label_embedding
  done
}
pretraining() {
  local text=(task=masked_lm model=scratch model.width=128 model.blocks=2 model.vocabulary=8000)
  run pretraining-text language_modeling/wikitext2_valid_test txt "${text[@]}" trainer.max_epochs=20 optimizer.lr=1e-3
  run pretraining-none language_modeling/wikitext2_valid_test txt "${text[@]}" trainer.max_epochs=0
  for start in text none; do
    run "pretraining-sst2-$start" sentiment/sst2_sentence jsonl model=pretrained \
      "model.name=logs/tasks-pretraining-$start/run/model" trainer.max_epochs=10 optimizer.lr=5e-4 'seed=0,1,2'
  done
}
case $what in
  all | one) all ;;
  names) names ;;
  shots) shots ;;
  pretraining) pretraining ;;
  *) sed -n '2,12p' "$0" && exit 2 ;;
esac
