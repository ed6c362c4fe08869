#!/usr/bin/env bash
# The main job, end to end, on one machine: text -> tokenizer -> dense model -> upcycled MoE -> verified Hugging Face model.
#
#   make quickstart                     on the documentation and sources of the running Python
#   CORPUS=path make quickstart         on your own text (.jsonl, .txt or a folder)
#   MEGATRON_EXT_SAMPLE_DATA=folder make quickstart
#                                       on Japanese, English and Hindi together (folder/corpus/{ja,en,hi}_*.jsonl)
#
# It measures the machine, at the start and after the dense model, and trains fewer steps where all would take more than
# 8 minutes; QUICKSTART_SHARE=100 trains all.
# Results go to build/quickstart. Each step is an ordinary tool with a YAML beside this file and can be run alone.
# Interrupted and started again, the job goes on with the first step whose result is missing.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
out=build/quickstart
source "$here/../steps.sh"

free_gib() { "$python" -c 'import psutil; print(int(psutil.virtual_memory().available / 2**30))'; }

# --- what to train on --------------------------------------------------------------------------------------------------
if [ -n "${CORPUS:-}" ]; then source=$CORPUS; elif [ -n "${MEGATRON_EXT_SAMPLE_DATA:-}" ]; then source=$MEGATRON_EXT_SAMPLE_DATA; else source=python; fi
one_source $out "$source"

# --- how long ----------------------------------------------------------------------------------------------------------
share=$(share_of_steps $out "${QUICKSTART_SHARE:-}" QUICKSTART_SHARE)
of_steps() { echo $(($1 * share / 100)); }
dense_steps=$(of_steps 200)

# --- text -> tokens ----------------------------------------------------------------------------------------------------
prepare() { step "preprocess ($1)" $out/data/"$1" tool preprocess "${@:2}" --output $out/data/"$1" --config "$here/preprocess.yaml"; }
# The sources, and their shares in the first stage of the dense model, and in its last and the MoE model.
if [ "$source" = python ]; then
  step "corpus (code)" $out/corpus/code.jsonl tool corpus --config "$here/corpus.yaml"
  step "corpus (documentation)" $out/corpus/documentation.jsonl tool corpus --config "$here/corpus.yaml" \
    --output $out/corpus/documentation.jsonl --kind documentation
  step tokenizer $out/tokenizer tool tokenizer train --config "$here/tokenizer.yaml"
  for kind in code documentation; do prepare $kind $out/corpus/$kind.jsonl; done
  names="code documentation" broad="{code: 0.8, documentation: 0.2}" anneal="{code: 0.5, documentation: 0.5}"
  prompts=()
elif [ -n "${CORPUS:-}" ]; then
  step tokenizer $out/tokenizer tool tokenizer train "$CORPUS" --config "$here/tokenizer.yaml"
  prepare text "$CORPUS"
  names=text broad="{text: 1}" anneal="{text: 1}"
  prompts=(--prompts "The ")
else
  step tokenizer $out/tokenizer tool tokenizer train "$source"/corpus/*.jsonl --config "$here/tokenizer.yaml"
  for language in ja en hi; do prepare $language "$source"/corpus/${language}_*.jsonl --split 0.96 0.02 0.02; done
  names="ja en hi" broad="{ja: 0.4, en: 0.45, hi: 0.15}" anneal="{ja: 0.5, en: 0.3, hi: 0.2}"
  prompts=(--prompts "吾輩は" "The " "- किसी ")
fi
sources="" validation=""
for name in $names; do
  sources+="$name: {path: $out/data/$name/train}, "
  validation+="{path: $out/data/$name/validation}, "
done
data=("data.sources={$sources}" "data.validation=[$validation]")
text=$out/data/${names%% *}/validation

# --- dense -> MoE ------------------------------------------------------------------------------------------------------
step "dense pretraining" $out/dense/"$(iteration $dense_steps)" \
  train 2 "$here/dense.yaml" "${data[@]}" schedule.warmup_iters="$(of_steps 20)" \
  "data.stages=[{name: broad, mix: $broad, steps: $(of_steps 160)}, {name: anneal, mix: $anneal, steps: $(of_steps 40)}]"
if [ ! -e $out/moe_share ]; then
  if [ -z "${QUICKSTART_SHARE:-}" ]; then share=$("$python" "$here/measure.py" "$share" $SECONDS); fi
  echo "$share" > $out/moe_share
fi
share=$(cat $out/moe_share)
moe_steps=$(of_steps 80)
moe_data=("${data[@]}" "data.stages=[{name: all, mix: $anneal, steps: $moe_steps}]" "schedule.warmup_iters=$(of_steps 8)")
step upcycling $out/upcycling.json tool upcycle --config "$here/upcycle.yaml" --text "$text" --force

# The first half under TP2 x EP2 x PP2 on 8 processes if there is memory for them, else TP2 x EP2 on 4; the second half
# in another layout, PP2 x EP2 x DP2 on 4.
first_half=(8); [ "$(free_gib)" -ge 5 ] || first_half=(4 parallel.pipeline_model_parallel_size=1)
half=$((moe_steps / 2)) all=$out/moe/$(iteration $moe_steps)
if [ ! -e "$all" ]; then
  step "MoE pretraining, first half (${first_half[0]} processes)" $out/moe/"$(iteration $half)" \
    train "${first_half[0]}" "$here/moe.yaml" train.stop_at_iteration=$half "${first_half[@]:1}" \
    "${moe_data[@]}"
fi
step "MoE pretraining, second half in another layout" "$all" \
  train 4 "$here/moe.yaml" parallel.tensor_model_parallel_size=1 parallel.sequence_parallel=false \
  "${moe_data[@]}"

# --- MoE -> Hugging Face -----------------------------------------------------------------------------------------------
step export $out/hf tool convert --config "$here/convert.yaml"
step verify $out/verification.json tool verify --config "$here/verify.yaml" --text "$text"
step generate $out/generated.json tool generate --config "$here/generate.yaml" "${prompts[@]}"

echo "== report"
tool report --config "$here/report.yaml"
echo "checkpoints: $out/dense, $out/moe"
echo "Hugging Face model: $out/hf"
