# Everything runs in ./.venv, which the first target that needs it creates.

# Unless given (make demo PYTHON=/path/to/python3.12): the first one here that
# is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && { echo $$p; exit; }; done; echo python3)
BIN := .venv/bin

# The demo and the tests are sized for a CPU; JAX_PLATFORMS=cuda overrides.
JAX_PLATFORMS ?= cpu
export JAX_PLATFORMS
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests about what programs compute, to its last bit: they run as users do.
NUMBERS := ops export_test.py harden_test.py integer_test.py
NUMBERS += reproducible_test.py train_convolutions_test.py
NUMBERS := $(addprefix tests/,$(NUMBERS))
# The others' time is mostly spent on compiling, and is less where XLA and LLVM
# do not optimize.  A flag that XLA does not know ends the process.
QUICKLY = export JAX_DISABLE_MOST_OPTIMIZATIONS=true; given=$$XLA_FLAGS; \
  export XLA_FLAGS="$$given --xla_cpu_use_fusion_emitters=false \
    --xla_cpu_parallel_codegen_split_count=1"; \
  $(BIN)/python -c 'import jax; jax.devices()' 2> /dev/null || XLA_FLAGS=$$given

# What also has to pass in the other mode of flax.nnx.
TREE_MODE_TESTS = $(wildcard tests/graph* tests/layers* tests/train_test.py)

PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test docs browser lint format wheel clean

help:
	@echo 'make demo    train, compress, harden and evaluate on real digits'
	@echo 'make test    lint, types, tests and doctests'
	@echo 'make docs    the documentation as a site, into build/docs/html'
	@echo 'make browser a Chromium for the tests of the HTML report'
	@echo 'make lint    ruff, mypy and shellcheck'
	@echo 'make format  rewrite the code in the house style'
	@echo 'make wheel   build the wheel and the sdist into dist/'
	@echo 'make clean   remove build outputs and caches; keeps .venv and runs'

demo: .venv/.demo-installed
	$(BIN)/djpq train --config configs/digits.py --workdir runs/digits \
	  --overwrite

test: lint
	$(PYTEST) --durations=4 $(NUMBERS)
	$(QUICKLY); $(PYTEST) --durations=12 $(addprefix --ignore=,$(NUMBERS))
	@if [ -n '$(TREE_MODE_TESTS)' ]; then \
	  echo 'Again, with the trees of flax.nnx instead of its graphs:'; \
	  export NNX_GRAPH_MODE=false NNX_GRAPH_UPDATES=false; \
	  $(QUICKLY); $(PYTEST) -m "not slow" $(TREE_MODE_TESTS); fi

# Every warning is an error, a name without a page among them; -E, as what has
# been read once would warn no more.
docs: .venv/.docs-installed
	$(BIN)/python -m sphinx -W --keep-going -n -E -q -d build/docs/doctrees \
	  docs build/docs/html
	@echo 'Open build/docs/html/index.html'

# A Chromium for the tests of the HTML report, which are skipped without one.
browser: .venv/.dev-installed
	$(BIN)/python -m pip install -e '.[browser]'
	.ci/browser $(BIN)/python

lint: .venv/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x .ci/run .ci/browser launch/*.sh

format: .venv/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: .venv/.dev-installed
	$(BIN)/python -m build

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	rm -f docs/one_layer.ipynb
	find configs djpq_jax tests -name __pycache__ -prune -exec rm -rf {} +

.venv/.demo-installed: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[demo]'
	@touch $@

# The development tools include all that the demo needs.
.venv/.dev-installed: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[dev]'
	@touch .venv/.demo-installed $@

# At once, where all is needed: each of these commands takes its minute.  Most of
# what comes along is never imported, so that compiling it would take another.
.venv/.all-installed: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --no-compile -e '.[dev,docs,browser]'
	@touch .venv/.demo-installed .venv/.dev-installed .venv/.docs-installed $@

.venv/.docs-installed: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install -e '.[docs]'
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys' 2>/dev/null || { echo \
	  'There is no $(PYTHON) here: install Python 3.11 or newer, then' \
	  'run make $(MAKECMDGOALS) PYTHON=/path/to/it.' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "Python 3.11 or newer is needed, and $(PYTHON) is `$(PYTHON) -c \
	  'import platform; print(platform.python_version())'`:" \
	  'run make $(MAKECMDGOALS) PYTHON=/path/to/a/newer/python.' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo \
	  '$(PYTHON) cannot create environments: install its venv module' \
	  '(Debian and Ubuntu: sudo apt install python3-venv) and run' \
	  'make $(MAKECMDGOALS) again.' >&2; exit 1; }
	$(PYTHON) -m venv .venv
