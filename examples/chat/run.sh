#!/usr/bin/env bash
# Post-training, end to end, on one machine: pretrained -> SFT -> DPO by LoRA -> merged -> verified Hugging Face model
# that answers through its chat template.
#
#   make chat                                    on what the standard library of the running Python says of itself
#   MEGATRON_EXT_SAMPLE_DATA=folder make chat    on folder/corpus, folder/sft and folder/preference (*.jsonl)
#
# It measures the machine, and trains fewer steps on a slow one; CHAT_SHARE=100 trains all. Results go to build/chat.
# Each step is an ordinary tool and can be run alone. Interrupted and started again, the job goes on with the first step
# whose result is missing, and within that step where it was.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
out=build/chat
source "$here/../steps.sh"

one_source $out "${MEGATRON_EXT_SAMPLE_DATA:-python}"
share=$(share_of_steps $out "${CHAT_SHARE:-}" CHAT_SHARE)
pretraining=$((120 * share / 100)) sft=$((80 * share / 100)) dpo=$((40 * share / 100))

# --- text, conversations, pairs ----------------------------------------------------------------------------------------
if [ -n "${MEGATRON_EXT_SAMPLE_DATA:-}" ]; then
  corpus=$MEGATRON_EXT_SAMPLE_DATA/corpus chats=$MEGATRON_EXT_SAMPLE_DATA/sft answers=$MEGATRON_EXT_SAMPLE_DATA/preference
else
  corpus=$out/corpus chats=$out/python_chats.jsonl answers=$out/python_chats.jsonl
  step corpus $corpus/documentation.jsonl tool corpus --kind documentation --output $corpus/documentation.jsonl
  step "conversations" $chats "$python" "$here/python_chats.py" $chats
fi
rows=$out/rows
step "questions and pairs" $rows/pairs.jsonl "$python" "$here/rows.py" "$chats" "$answers" $rows
step tokenizer $out/tokenizer tool tokenizer train "$corpus" --output $out/tokenizer --vocab-size 4096
step "preprocess (text)" $out/data/text \
  tool preprocess "$corpus" --tokenizer $out/tokenizer --output $out/data/text --split 0.96 0.02 0.02
conversations() {
  local input=$1 output=$2
  shift 2
  tool preprocess "$input" "$@" --tokenizer $out/tokenizer --chat-template "$here/template.jinja" --output "$output" \
    --bad-lines skip --split 0.9 0.05 0.05
}
step "preprocess (conversations)" $out/data/chat conversations $rows/chats.jsonl $out/data/chat --chat --max-tokens 256
step "preprocess (pairs)" $out/data/pairs conversations $rows/pairs.jsonl $out/data/pairs --preference --max-tokens 128

# --- pretrained -> SFT -> DPO ------------------------------------------------------------------------------------------
step pretraining $out/pretrained/"$(iteration $pretraining)" train 2 "$here/pretrain.yaml" train.train_iters=$pretraining
# What it writes to the questions that were set aside: does it stop, does it repeat itself?
asking="python \"$root/tools/evaluate.py\" probe \"\$CHECKPOINT\" --prompts \"$PWD/$rows/questions.jsonl\" --max-new-tokens 60"
# tuned NAME DATA START STEPS: a run of this folder on the data of $out
tuned() {
  local name=$1 data=$2 start=$3 steps=$4
  step "$name" $out/"$name"/"$(iteration "$steps")" train 2 "$here/$name.yaml" checkpoint.directory=$out/"$name" \
    checkpoint.initialize_from=$out/"$start" data.tokenizer=$out/data/"$data"/tokenizer \
    "data.sources={$data: {path: $out/data/$data/train}}" "data.stages=[{name: $data, mix: {$data: 1}, steps: $steps}]" \
    "data.validation=[{path: $out/data/$data/validation}]" train.micro_batch_size=8 \
    "evaluation.on_checkpoint=$asking"
}
tuned sft chat pretrained $sft
tuned dpo pairs sft $dpo

# --- merged -> Hugging Face --------------------------------------------------------------------------------------------
step merge $out/merged tool merge_lora $out/dpo $out/merged --dtype fp32
step export $out/hf tool convert $out/merged $out/hf
step verify $out/verification.json tool verify $out/merged $out/hf --text $out/data/text/validation \
  --figures $out/verification.json
step answers $out/answers.json "$python" "$here/ask.py" $out/hf $rows/questions.jsonl $out/answers.json

echo "== report"
tool report pretrained=$out/pretrained SFT=$out/sft DPO=$out/dpo --title "megatron_ext: pretrained, SFT, DPO" \
  --figures $out/verification.json --generated $out/answers.json --output $out/report.html
echo "Hugging Face model: $out/hf"
