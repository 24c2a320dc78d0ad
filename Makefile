# SPDX-License-Identifier: Apache-2.0
# Everything runs in .venv, with the versions pinned in constraints.txt.
#   make demo PYTHON=python3.12                                          another interpreter
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo   torch without CUDA: 2 GB less

PYTHON ?= python3
BENCH ?= block_sparse_linear
TESTS ?=
STAGE ?= 0
OUT ?= out/gpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
SOURCES := setup.py pyproject.toml constraints.txt $(shell find csrc -type f)

.PHONY: demo test lint bench gpu wheel asan clean

demo: .venv/installed
	$(BIN)/lean-kernels demo --out out/demo --force

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(TESTS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/lean-kernels bench $(BENCH)

# On a machine with a GPU, in the Python that holds its torch; DRY=1 anywhere.
gpu:
	bash bench/gpu.sh $(STAGE) $(OUT)

wheel: .venv/installed
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

asan: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tests/asan.sh

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f lean_kernels/*.so lean_kernels/_build_info.json .venv/installed

# torch goes first: setup.py builds against it, so the package installs without build isolation.
.venv/torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the pinned versions need Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt torch setuptools wheel
	@touch $@

.venv/installed: .venv/torch $(SOURCES)
	$(PIP) --no-build-isolation -c constraints.txt -e '.[test]'
	@touch $@
