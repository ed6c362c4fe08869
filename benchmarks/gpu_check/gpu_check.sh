#!/usr/bin/env bash
# Everything that one GPU should tell in eight minutes about this repository, in one call, in the repository's root:
#   bash benchmarks/gpu_check/gpu_check.sh           on a GPU; results under $OUT (build/gpu_check)
#   bash benchmarks/gpu_check/gpu_check.sh --tiny    on CPU: does every part run?
# A machine without a network takes its Python packages from wheels in .whl/, where that folder is there.
# Options are gpu_check.py's; --budget is the seconds after which no further part begins.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export OUT=${OUT:-$PWD/build/gpu_check} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUBLAS_WORKSPACE_CONFIG=${CUBLAS_WORKSPACE_CONFIG:-:4096:8}  # what deterministic products take
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-8}
python=${PYTHON:-python3}
mkdir -p "$OUT"
if compgen -G ".whl/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl || exit 1
  export PYTHONPATH=/tmp/site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH}
set -o pipefail
"$python" "$here/gpu_check.py" "$@" 2>&1 | tee "$OUT/log.txt"
