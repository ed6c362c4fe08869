#!/usr/bin/env bash
# Runs what touches foreign interfaces (exported code, architectures, tokenizers, generation) under the newest
# transformers, tokenizers and huggingface-hub that pip resolves today, in an environment over that of the given Python.
#   requirements/foreign.sh .venv/bin/python .venv-foreign
# Where these are the versions of that environment, nothing is left to show: its own tests have shown it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:?usage: $0 PYTHON ENVIRONMENT} environment=${2:?usage: $0 PYTHON ENVIRONMENT}
packages=(transformers tokenizers huggingface-hub)
tests=(
  tests/unit/architectures tests/unit/model_io tests/unit/data/test_tokenizer.py
  tests/unit/mcore/test_hugging_face_models.py
)

versions() {
  "$1" -c 'import sys, importlib.metadata as m; print(*(f"{name} {m.version(name)}" for name in sys.argv[1:]), sep=", ")' \
    "${packages[@]}"
}

"$python" -m venv --clear "$environment"
# What is not installed here anew comes from the environment below, this checkout too.
below=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
here=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "import site; site.addsitedir('$below')" > "$here/below.pth"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade "${packages[@]}" 2>&1 |
  { grep -v "Not uninstalling\|Can't uninstall" || true; }

tested=$(versions "$python") newest=$(versions "$environment/bin/python")
echo "tested: $tested"
echo "newest: $newest"
if [ "$tested" = "$newest" ]; then
  echo "the newest versions are those that were tested: nothing to run again"
  exit 0
fi
exec "$environment/bin/python" -m pytest "${tests[@]}"
