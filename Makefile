# make setup | quickstart | test | lint          (needs only Python 3.11+ and a network for pip)
# make test-foreign                              what touches transformers and tokenizers, under their newest versions
# make test-newest [TE=1]                        the same tests on Python 3.12 with megatron-core 0.19; TE=1 builds
#                                                Transformer Engine there (needs nvcc, no GPU) for the tests of it
# make lock                                      renews the tested versions of every Python that is here
PYTHON ?= python3
PYTHON_NEWEST ?= python3.12
VENV := .venv
READY := $(VENV)/.ready
NEWEST := .venv-newest
FOREIGN := .venv-foreign
OLDEST_TRANSFORMERS := .transformers-oldest
LOCKS := $(wildcard requirements/lock-*.txt)
VERSIONS := pyproject.toml setup.py requirements/cpu.txt requirements/install.sh $(LOCKS)

.PHONY: setup quickstart test test-foreign test-newest lint lock clean

setup: $(READY)

$(READY): $(VERSIONS)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	requirements/install.sh $(VENV)/bin/python
	touch $@

quickstart: $(READY)
	PYTHON=$(CURDIR)/$(VENV)/bin/python examples/quickstart/run.sh

test: $(READY) $(OLDEST_TRANSFORMERS)/.ready
	$(VENV)/bin/python -m pytest

$(OLDEST_TRANSFORMERS)/.ready: requirements/oldest_transformers.txt | $(READY)
	rm -rf $(OLDEST_TRANSFORMERS)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST_TRANSFORMERS) -r $<
	touch $@

test-foreign: $(READY)
	requirements/foreign.sh $(VENV)/bin/python $(FOREIGN)

test-newest: $(NEWEST)/.ready $(if $(TE),$(NEWEST)/.transformer-engine)
	$(NEWEST)/bin/python -m pytest

$(NEWEST)/.ready: $(VERSIONS)
	@command -v $(PYTHON_NEWEST) > /dev/null || { echo "$(PYTHON_NEWEST) is not here; megatron-core 0.19 needs Python 3.12: make test-newest PYTHON_NEWEST=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON_NEWEST) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 12) else "megatron-core 0.19 needs Python 3.12 or newer: make test-newest PYTHON_NEWEST=...")'
	test -x $(NEWEST)/bin/python || $(PYTHON_NEWEST) -m venv $(NEWEST)
	requirements/install.sh $(NEWEST)/bin/python
	touch $@

$(NEWEST)/.transformer-engine: $(NEWEST)/.ready requirements/transformer_engine.sh
	requirements/transformer_engine.sh $(NEWEST)/bin/python
	touch $@

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	for run in $$(grep -l "^model:" examples/*/*.yaml); do $(VENV)/bin/python tools/train.py $$run --check --config-only > /dev/null || exit 1; done

lock:
	@for lock in $(LOCKS); do \
	  version=$${lock#requirements/lock-}; python=python$${version%.txt}; \
	  if $$python -c '' 2> /dev/null; then $$python requirements/lock.py || exit 1; \
	  else echo "$$lock stays as it is: $$python is not here" >&2; fi; \
	done

clean:
	rm -rf build/quickstart
