#!/usr/bin/env bash
# Installs what was tested together on the given Python into its environment, and this checkout with it.
#   requirements/install.sh .venv/bin/python
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:?usage: $0 PYTHON}
version=$("$python" -c 'import sys; print("{}.{}".format(*sys.version_info))')
lock=requirements/lock-$version.txt
install=("$python" -m pip install --quiet --disable-pip-version-check)
if [ -f "$lock" ]; then
  "${install[@]}" -r "$lock"
  "${install[@]}" --no-deps --no-build-isolation -e .
else
  echo "no versions were tested together on Python $version ($lock is not there): installing the newest ones of pyproject.toml's ranges" >&2
  "${install[@]}" -r requirements/cpu.txt -e '.[dev]'
fi
