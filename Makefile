# make setup | quickstart | test | lint          (needs only Python 3.11+ and a network for pip)
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: setup quickstart test lint clean

setup: $(READY)

$(READY): pyproject.toml setup.py requirements/cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

quickstart: $(READY)
	PYTHON=$(CURDIR)/$(VENV)/bin/python examples/quickstart/run.sh

test: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	for run in $$(grep -l "^model:" examples/*/*.yaml); do $(VENV)/bin/python tools/train.py $$run --check > /dev/null || exit 1; done

clean:
	rm -rf build/quickstart
