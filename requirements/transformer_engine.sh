#!/usr/bin/env bash
# Builds Transformer Engine's PyTorch extension into the environment of the given Python, against the torch there.
# Needs nvcc (CUDA_HOME), no GPU; about ten minutes on two cores, after which pip's cache has the wheel.
#   requirements/transformer_engine.sh .venv-newest/bin/python
set -euo pipefail

python=${1:?usage: $0 PYTHON}
version=${TE_VERSION:-2.20.2}
jobs=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)}
cuda=$("$python" -c 'import torch; print((torch.version.cuda or "").split(".")[0])')
if [ -z "$cuda" ]; then
  echo "the torch of $python is built without CUDA; Transformer Engine must be built against one with it" >&2
  exit 1
fi
home=${CUDA_HOME:-}
for candidate in /usr/local/cuda-"$cuda"*/bin/nvcc /usr/local/cuda/bin/nvcc "$(command -v nvcc || true)"; do
  if [ -z "$home" ] && [ -x "$candidate" ]; then
    home=$(dirname "$(dirname "$candidate")")
  fi
done
if [ ! -x "$home/bin/nvcc" ]; then
  echo "no nvcc found: install the CUDA $cuda toolkit, or set CUDA_HOME to where it lives" >&2
  exit 1
fi

install=("$python" -m pip install --quiet --disable-pip-version-check)
"${install[@]}" --no-deps "transformer-engine==$version" "transformer-engine-cu$cuda==$version"
"${install[@]}" pybind11 ninja cmake onnxscript onnx einops pydantic nvdlfw-inspect setuptools wheel
# The headers and libraries of cuDNN and NCCL come with torch, in packages of their own.
packages=$("$python" -c 'import nvidia; print(list(nvidia.__path__)[0])')
PATH=$(cd "$(dirname "$python")" && pwd):$PATH
export PATH
CPATH=$packages/cu$cuda/include:$packages/cudnn/include:$packages/nccl/include${CPATH:+:$CPATH} \
  LIBRARY_PATH=$packages/cu$cuda/lib:$packages/cudnn/lib:$packages/nccl/lib${LIBRARY_PATH:+:$LIBRARY_PATH} \
  CUDA_HOME=$home NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS=${NVTE_CUDA_ARCHS:-90} MAX_JOBS=$jobs \
  "${install[@]}" --no-build-isolation --no-deps "transformer-engine-torch==$version"
"$python" -c 'import torch, transformer_engine.pytorch as te; print("Transformer Engine is built:", te.__file__)'
