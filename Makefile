# make setup | quickstart | test | lint          (needs only Python 3.11+ and a network for pip; PYTHON=... says which
#                                                one, otherwise the newest of 3.13, 3.12 and 3.11 that runs)
# make chat                                      SFT, DPO and a merged, verified chat model (examples/chat/run.sh)
# make test-all                                  also the cells of products that other cells stand for: about twice as long
# make test-foreign                              what touches transformers and tokenizers, under their newest versions
# make test-core                                 what touches megatron-core, on Python 3.12 with megatron-core 0.19
# make test-newest [TE=1]                        every test there; TE=1 builds
#                                                Transformer Engine there (needs nvcc, no GPU) for the tests of it
# make prove-recipes                             every recipe's layout, as large as this machine holds (make test: 8 ranks)
# make docs                                      the guides as pages in build/docs
# make lock                                      renews the tested versions of every Python that is here
PYTHON ?=
unexport PYTHON
PYTHON_NEWEST ?= python3.12
VENV := .venv
READY := $(VENV)/.ready
NEWEST := .venv-newest
FOREIGN := .venv-foreign
OLDEST_TRANSFORMERS := .transformers-oldest
LOCKS := $(wildcard requirements/lock-*.txt)
VERSIONS := pyproject.toml setup.py requirements/cpu.txt requirements/environment.sh requirements/install.sh $(LOCKS)
# Two processes, a file of tests in one of them; the dear ones (tests/slurm, tests/distributed) come first.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# What meets megatron-core: its faults and ours, models and experts, layouts, checkpoints.
CORE_TESTS := tests/unit/mcore tests/unit/runtime tests/distributed/test_core_guard.py tests/distributed/test_cpu_compat.py \
  tests/distributed/test_parity.py tests/distributed/test_gradient_norm.py tests/distributed/test_checkpoint.py \
  tests/distributed/test_fp8.py tests/distributed/test_adapters.py tests/distributed/test_adapter_checkpoints.py

.PHONY: setup quickstart chat test test-all test-foreign test-core test-newest prove-recipes lint docs lock clean

setup: $(READY)

$(READY): $(VERSIONS)
	@requirements/environment.sh $(VENV) $(PYTHON)
	requirements/install.sh $(VENV)/bin/python
	touch $@

quickstart: $(READY)
	PYTHON=$(CURDIR)/$(VENV)/bin/python examples/quickstart/run.sh

chat: $(READY)
	PYTHON=$(CURDIR)/$(VENV)/bin/python examples/chat/run.sh

test: $(READY) $(VENV)/.triton $(OLDEST_TRANSFORMERS)/.ready
	$(VENV)/bin/python $(PYTEST)

test-all: $(READY) $(VENV)/.triton $(OLDEST_TRANSFORMERS)/.ready
	$(VENV)/bin/python $(PYTEST) --product

$(VENV)/.triton: requirements/triton.txt $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

$(OLDEST_TRANSFORMERS)/.ready: requirements/oldest_transformers.txt | $(READY)
	rm -rf $(OLDEST_TRANSFORMERS)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OLDEST_TRANSFORMERS) -r $<
	touch $@

test-foreign: $(READY)
	requirements/foreign.sh $(VENV)/bin/python $(FOREIGN)

test-core: $(NEWEST)/.ready
	$(NEWEST)/bin/python $(PYTEST) $(CORE_TESTS)

test-newest: $(NEWEST)/.ready $(if $(TE),$(NEWEST)/.transformer-engine)
	$(NEWEST)/bin/python $(PYTEST)

$(NEWEST)/.ready: $(VERSIONS)
	@$(PYTHON_NEWEST) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null || { echo "$(PYTHON_NEWEST) does not run here or is older than 3.12, which megatron-core 0.19 needs: make $(MAKECMDGOALS) PYTHON_NEWEST=/path/to/python3.12" >&2; exit 1; }
	@requirements/environment.sh $(NEWEST) $(PYTHON_NEWEST)
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
	$(VENV)/bin/mkdocs build --quiet --strict
	for run in $$(grep -l "^model:" examples/*/*.yaml); do $(VENV)/bin/python tools/train.py $$run --check --config-only > /dev/null || exit 1; done

# The first --world-size that a recipe names is what it is for.
prove-recipes: $(READY)
	for run in examples/recipes/*.yaml; do \
	  $(VENV)/bin/python tools/prove.py $$run $$(sed -n 's/.*\(--world-size [0-9]*\).*/\1/p' $$run | head -1) || exit 1; \
	done

docs: $(READY)
	$(VENV)/bin/mkdocs build --strict

lock:
	@for lock in $(LOCKS); do \
	  version=$${lock#requirements/lock-}; python=python$${version%.txt}; \
	  if $$python -c '' 2> /dev/null; then $$python requirements/lock.py || exit 1; \
	  else echo "$$lock stays as it is: $$python is not here" >&2; fi; \
	done

clean:
	rm -rf build/quickstart build/chat
