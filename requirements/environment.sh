#!/usr/bin/env bash
# Makes an environment with the newest Python that runs here, and says which megatron-core that brings.
#   requirements/environment.sh .venv                         python3.13, 3.12, 3.11 or python3: the first that runs
#   requirements/environment.sh .venv /path/to/python3.12     this one
# An environment that is there keeps its Python.
set -euo pipefail

environment=${1:?usage: $0 ENVIRONMENT [PYTHON]} asked=${2:-}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
oldest=3.11 best=3.12

# Major and minor version; nothing where the command does not run, as those of Pythons that pyenv has switched off.
version_of() { "$1" -c 'import sys; print("{}.{}".format(*sys.version_info))' 2> /dev/null || true; }

at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# Why a Python cannot be used; nothing where it can.
fault_of() {
  local version
  version=$(version_of "$1")
  if [ -z "$version" ]; then
    echo "it does not run"
  elif ! at_least "$oldest" "$version"; then
    echo "it is Python $version, and $oldest is the oldest that is supported"
  elif ! "$1" -c 'import venv, ensurepip' 2> /dev/null; then
    echo "it lacks the venv module (Debian: apt install python$version-venv)"
  fi
}

# What pip installs for a version of Python.
core_of() {
  local locked=""
  [ ! -f "$here/lock-$1.txt" ] || locked=$(sed -n 's/^megatron-core==//p' "$here/lock-$1.txt")
  echo "megatron-core ${locked:-in the newest version for it}"
}

if [ -x "$environment/bin/python" ]; then
  version=$(version_of "$environment/bin/python")
  if [ -z "$version" ]; then
    echo "$environment: its Python does not run any more; remove $environment and start again" >&2
    exit 2
  fi
  echo "$environment keeps Python $version with $(core_of "$version")"
  if [ -n "$asked" ] && [ "$(version_of "$asked")" != "$version" ]; then
    echo "  $asked is not in use: remove $environment first" >&2
  fi
else
  python=""
  for candidate in ${asked:-python3.13 python3.12 python3.11 python3}; do
    [ -n "$asked" ] || command -v "$candidate" > /dev/null || continue
    fault=$(fault_of "$candidate")
    if [ -z "$fault" ]; then
      python=$candidate
      break
    fi
    echo "$candidate is left out: $fault" >&2
  done
  if [ -z "$python" ]; then
    echo "no Python to use: make PYTHON=/path/to/python$best ... takes one that is not on the path" >&2
    exit 2
  fi
  version=$(version_of "$python")
  "$python" -m venv "$environment"
  echo "$environment: Python $version with $(core_of "$version")"
fi
if ! at_least "$best" "$version"; then
  echo "  Python $best with $(core_of "$best") is the one to use; $version is the oldest that is supported" >&2
fi
