# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, which the first target makes. Options: PYTHON=python3.12, ARGS="...",
# PYFAST_CUDA=AUTO|ON|OFF, PYFAST_WERROR=ON|OFF.

PYTHON ?= python3
PYFAST_CUDA ?= AUTO
PYFAST_WERROR ?= OFF
ARGS ?=

BIN := .venv/bin
REQUIREMENTS := .venv/.requirements
BUILT := .venv/.built-$(PYFAST_CUDA)-$(PYFAST_WERROR)
CPP := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
CMAKE := CMakeLists.txt csrc/CMakeLists.txt third_party/cutlass.cmake

.DELETE_ON_ERROR:
.PHONY: help env finetune test lint format docs bench build clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

env: $(BUILT)  ## make .venv: pinned requirements, pyfast in editable form, its extension

finetune: env  ## fine-tune the default model on the default data (ARGS: flags of `pyfast finetune`)
	$(BIN)/pyfast finetune $(ARGS)

test: env  ## run the tests that need no GPU (ARGS: flags of pytest)
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

lint: env  ## check style, types, layers and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/gersemi --check $(CMAKE)

format: env  ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/gersemi --in-place $(CMAKE)

docs: env  ## write docs/matrix.md from the tables of families and methods
	$(BIN)/python -m pyfast.cli.matrix >docs/matrix.md

bench: env  ## measure pyfast and its peers (ARGS: flags of `python -m benchmarks.run`)
	$(BIN)/python -m benchmarks.run $(ARGS)

build: env  ## sdist, and the wheel built from it, into dist/
	$(BIN)/python -m build --config-setting=cmake.define.PYFAST_CUDA=$(PYFAST_CUDA)

clean:  ## remove build outputs and caches; .venv stays
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find benchmarks pyfast tests -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: $(PYTHON) was not found. pyfast needs Python 3.11 or newer." >&2; \
	  echo "Fix: install it, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: pyfast needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V)." >&2; \
	  echo "Fix: name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# torch goes first, by itself, so that whatever build of that version pip finds serves all the rest.
$(REQUIREMENTS): requirements-dev.txt requirements-data.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' requirements-dev.txt)"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt
	@touch $@

# Without isolation: the pinned build tools of .venv serve, and ninja rebuilds only what changed.
$(BUILT): $(REQUIREMENTS) pyproject.toml CMakeLists.txt $(shell find csrc third_party -type f)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . \
	  --config-settings=cmake.define.PYFAST_CUDA=$(PYFAST_CUDA) \
	  --config-settings=cmake.define.PYFAST_WERROR=$(PYFAST_WERROR)
	@rm -f .venv/.built-*
	@touch $@
