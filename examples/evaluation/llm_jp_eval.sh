#!/usr/bin/env bash
# llm-jp-eval on a checkpoint of a run; its scores join the run's metrics.
#   evaluation: {on_checkpoint: bash examples/evaluation/llm_jp_eval.sh}
# It has no package on PyPI: install it from https://github.com/llm-jp/llm-jp-eval (LLM_JP_EVAL names the checkout), and
# prepare its data sets there (DATASETS names their folder) on a machine with a network. The options are those of its
# 1.x, as its guide has them; compare them with yours. We have not run it.
set -euo pipefail
: "${LLM_JP_EVAL:?the checkout of llm-jp-eval}" "${DATASETS:?the folder of its data sets}"
exported=$EVALUATION_DIRECTORY/hf
python tools/convert.py "$CHECKPOINT" "$exported" --dtype bf16 --verify --force >&2
trap 'rm -rf "$exported"' EXIT
python "$LLM_JP_EVAL/scripts/evaluate_llm.py" -cn config.yaml log_dir="$EVALUATION_DIRECTORY" dataset_dir="$DATASETS" \
  model.pretrained_model_name_or_path="$exported" tokenizer.pretrained_model_name_or_path="$exported" >&2
# Of what it writes, the numbers under "scores", wherever they stand.
python - "$EVALUATION_DIRECTORY" << 'EOF'
import json, pathlib, sys

def scores(content):
    if isinstance(content, dict):
        if isinstance(content.get("scores"), dict):
            return content["scores"]
        return next((found for value in content.values() if (found := scores(value))), None)

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    if found := scores(json.loads(path.read_text())):
        numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
        print(json.dumps({f"llm-jp-eval/{name}": value for name, value in numbers.items()}))
EOF
