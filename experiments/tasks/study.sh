#!/usr/bin/env bash
# The runs of README.md beside this file. Finished ones are skipped, so it may be stopped and started again.
#
#   experiments/tasks/study.sh all DATA             a run for each data set, with the settings that its task starts with
#   experiments/tasks/study.sh one DATA NAME        one of them
#   experiments/tasks/study.sh names DATA           names in news: full precision, and 8 bits in the fit
#   experiments/tasks/study.sh shots DATA           0 to 32 rows of each class, three heads, five seeds, two data sets
#   experiments/tasks/study.sh pretraining DATA     small models on raw text first, or not
#
# DATA has a folder KIND/NAME for each data set, with train, validation and test.jsonl (.txt for raw text).
# BART and LLAMA may name folders of models that write.
set -euo pipefail
what=${1:-} data=$(realpath "${2:-.}") only=${3:-} self=$(realpath "$0")
cd "$(dirname "$self")/../.."
mkdir -p logs
bart=${BART:-} llama=${LLAMA:-}
run() { # STUDY FOLDER ENDING MORE...
  local test=$data/$2/test.$3
  .venv/bin/python train.py -m study="tasks-$1" data=files "data.train=$data/$2/train.$3" \
    "data.validation=$data/$2/validation.$3" "data.test=$test" logger=none measure=scores 'callbacks=[]' \
    trainer.limit_validation_batches=1 "${@:4}"
}
rows() { # NAME FOLDER MORE...: where none is named, all
  [ "${only:-$1}" != "$1" ] || run "$1" "$2" jsonl "${@:3}"
}
writes() { # NAME FOLDER MODEL MORE...: measured before, too, since there is no majority to compare with
  [ -z "$3" ] || rows "$1" "$2" model=pretrained "model.name=$3" measure.before=true "${@:4}"
}
again() { # NAME RUN FILE: the run of an earlier row, on other test rows
  local scores=logs/tasks-$1.json
  if [ "${only:-$1}" = "$1" ] && [ ! -f "$scores" ]; then
    .venv/bin/niwaki evaluate "logs/tasks-$2/run" "$3" > "$scores.partial"
    mv "$scores.partial" "$scores"
  fi
}
chats() { # NAME MODEL MORE...
  if [ -n "$2" ] && [ "${only:-$1}" = "$1" ]; then
    .venv/bin/python train.py -m study="tasks-$1" data=files data.format=chat task=instruction model=pretrained \
      "data.train=$data/instruction/llamafactory_demo/alpaca_en_demo.json" "model.name=$2" logger=none measure=scores \
      measure.before=true 'callbacks=[]' trainer.limit_validation_batches=1 "${@:3}"
  fi
}
all() { # as many rows as take five minutes on two cores
  rows sst2 sentiment/sst2_sentence data.limit=3000
  rows sst2_glue sentiment/sst2_glue data.limit=2500
  rows sst5 sentiment/sst2_sentence/fine data.limit=2500
  rows ag_news topic/ag_news data.limit=2000
  rows banking77 intent/banking77 data.limit=3000 trainer.max_epochs=5
  rows cola sentence_pair/cola data.limit=4000
  rows mrpc sentence_pair/mrpc data.limit=1600
  rows rte sentence_pair/rte data.limit=800
  rows qnli sentence_pair/qnli data.limit=1000
  rows stsb sentence_pair/stsb task=regression data.limit=2500
  rows financial_phrasebank finance/financial_phrasebank data.limit=1500
  rows fiqa finance/fiqa_sa task=regression trainer.max_epochs=10
  rows conll2003 ner/conll2003 task=ner data.limit=2000
  rows cluener ner/cluener task=ner data.limit=1000 trainer.max_epochs=10
  rows semeval2010_task8 relation_extraction/semeval2010_task8 task=relation data.limit=1200
  rows squad question_answering/squad_v2_half_dev task=question_answering task.null_threshold=null data.limit=400
  local unseen=logs/tasks-xquad.jsonl # without the paragraphs that the squad run learned from
  [ "${only:-xquad}" != xquad ] || grep -v '"in_squad_v2_half_dev": *"train"' "$data/question_answering/xquad/test.jsonl" > "$unseen"
  again xquad squad "$unseen"
  rows cmrc2018 question_answering/cmrc2018 task=question_answering task.null_threshold=null data.skip_empty=true data.limit=150
  rows commonsense_qa commonsense/commonsense_qa task=multiple_choice data.limit=500
  rows arc_easy commonsense/arc_easy task=multiple_choice data.limit=500
  rows copa commonsense/copa task=multiple_choice
  rows piqa commonsense/piqa task=multiple_choice data.limit=500
  rows movielens recommendation/movielens_small task=retrieval data.limit=800
  rows afqmc chinese/afqmc data.limit=2000
  rows chnsenticorp chinese/chnsenticorp data.limit=500
  rows tnews chinese/tnews_fewclue trainer.max_epochs=10
  writes g2p translation/g2p_lexicon_us "$bart" task=translation task.max_length=64 task.max_target_length=64 data.limit=300
  local small=(optimizer.lr=1e-3 data.batch_size=16 trainer.max_epochs=5) # of a model of 260,000 parameters
  writes multi30k translation/multi30k_en_de "$llama" task=translation "${small[@]}" data.limit=400
  writes samsum summarization/samsum "$llama" task=summarization "${small[@]}" data.limit=200
  writes scitldr summarization/scitldr_a "$llama" task=summarization "${small[@]}" data.limit=200
  writes dailydialog dialogue/dailydialog "$llama" task=dialogue "${small[@]}" data.limit=400
  writes personachat dialogue/personachat_val_test "$llama" task=dialogue "${small[@]}" data.limit=400
  writes e2e table_to_text/e2e_nlg "$llama" task=table_to_text "${small[@]}" data.limit=400
  writes gsm8k math/gsm8k "$llama" task=summarization data.columns.source=question data.columns.target=answer "${small[@]}" data.limit=400
  local code=(task=code_generation task.max_length=320 task.max_target_length=192 optimizer.lr=1e-3)
  writes mbpp code_generation/mbpp "$llama" "${code[@]}"
  [ -z "$llama" ] || again humaneval mbpp "$data/code_generation/humaneval/test.jsonl"
  chats alpaca "$llama" "${small[@]}" data.limit=400
}
names() {
  run names-dense ner/conll2003 jsonl +experiment=ner_conll2003
  run names-qat ner/conll2003 jsonl +experiment=ner_conll2003 compression=quantize/qat
}
shots() { # a fit has 40 or 60 steps, however many rows there are
  local few=('seed=0,1,2,3,4' 'task.head=linear,label_embedding,contrastive' optimizer.lr=3e-4 data.limit=500
    trainer.max_epochs=200)
  run shots-ag_news topic/ag_news jsonl "${few[@]}" 'data.shots=4,8,16,32' trainer.max_steps=40 data.batch_size=16 \
    task.max_length=48
  local bank=$data/intent/banking77
  few+=(trainer.max_steps=60 data.batch_size=32 task.max_length=32)
  run shots-banking77 intent/banking77 jsonl "${few[@]}" 'data.shots=4,8,16'
  # the smallest class has 31 training rows: 32 are drawn from training and validation rows, by which nothing is chosen
  run shots-banking77-32 intent/banking77 jsonl "${few[@]}" data.shots=32 \
    "data.train=[$bank/train.jsonl,$bank/validation.jsonl]"
  local set
  for set in topic/ag_news intent/banking77; do
    run "zero-${set#*/}" "$set" jsonl data.shots=0 task.head=label_embedding
  done
}
reads_text() { # NAME FAMILY EPOCHS MORE...: a small model on raw text
  run "pretraining-$1" language_modeling/wikitext2_valid_test txt task=masked_lm model=scratch "model.name=$2" \
    model.width=128 model.blocks=2 "trainer.max_epochs=$3" "${@:4}"
}
labelled() { # NAME START MORE...: SST-2 from the weights of such a run
  run "pretraining-$1-$2" sentiment/sst2_sentence jsonl model=pretrained \
    "model.name=logs/tasks-pretraining-$2/run/model" optimizer.lr=5e-4 "${@:3}"
}
pretraining() { # after raw text, and as drawn
  local bert=(model.vocabulary=8000 optimizer.lr=1e-3) text=$data/language_modeling/wikitext2_valid_test start
  local modern=(model.vocabulary=4000 model.heads=4 'model.overrides={classifier_pooling: mean}' task.max_length=64
    data.batch_size=16 optimizer.lr=2e-3)
  reads_text bert-text bert 20 "${bert[@]}"
  reads_text bert-none bert 0 "${bert[@]}"
  reads_text modernbert-text modernbert 12 "${modern[@]}"
  reads_text modernbert-none modernbert 0 "${modern[@]}"
  reads_text more-text modernbert 16 "${modern[@]}" optimizer.weight_decay=0.1 \
    "data.train=[$text/train.txt,$text/validation.txt]" "data.validation=$text/test.txt"
  for start in bert-text bert-none; do
    labelled sst2 "$start" 'seed=0,1,2' trainer.max_epochs=10
  done
  for start in modernbert-text modernbert-none; do
    labelled sst2 "$start" 'seed=0,1,2' trainer.max_epochs=3
    labelled few "$start" 'seed=0,1,2' trainer.max_epochs=10 data.shots=500
    labelled dropout "$start" 'seed=0,1,2,3,4,5,6,7,8,9' trainer.max_epochs=10 data.shots=500 model.dropout=0.2
  done
  local seen=data.test=$data/sentiment/sst2_sentence/validation.jsonl # what was only tried is told by validation rows
  local fast='optimizer.lr_by_part={embeddings: 2e-3}'
  # of the other two, the runs above keep their validation scores
  labelled tried-dropout more-text 'seed=0,1' trainer.max_epochs=10 data.shots=500 model.dropout=0.2 "$seen"
  for start in more-text modernbert-text modernbert-none; do
    labelled tried-fast "$start" 'seed=0,1' trainer.max_epochs=10 data.shots=500 "$fast" "$seen"
  done
  for start in more-text modernbert-none; do
    labelled tried-sst2 "$start" trainer.max_epochs=3 model.dropout=0.1 "$fast" "$seen"
    labelled tried-200 "$start" 'seed=0,1,2' trainer.max_epochs=20 data.shots=100 model.dropout=0.2 "$seen"
  done
}
case $what in
  all) only='' all ;;
  one)
    if [ -z "$only" ] || ! grep -qE "(rows|writes|again|chats) $only " "$self"; then
      echo "one DATA NAME: no data set '$only' in $self" >&2
      exit 2
    fi
    all
    ;;
  names) names ;;
  shots) shots ;;
  pretraining) pretraining ;;
  *) sed -n '2,11p' "$self" && exit 2 ;;
esac
