PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
QUIET := -qq --disable-pip-version-check --no-input
SOURCES := wise_fast kernels bench tests
STAMP := $(VENV)/.installed
# Lies in the environment while pip works on it: found by the next run, it means an interrupted install.
UNFINISHED := $(VENV)/.unfinished

.DEFAULT_GOAL := help
.PHONY: help venv demo lint test test-demo test-gpu bench bench-ops bench-gpu tables aot clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

venv: $(STAMP) ## make .venv with everything in it, at the versions of constraints.txt

# torch first and alone: its pin takes a local CPU wheel where there is one, instead of gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (minutes the first time)"
	@if [ -e $(UNFINISHED) ] || ! $(PIP) --version >/dev/null 2>&1; then $(PYTHON) -m venv --clear $(VENV); fi
	@trap 'exit 130' INT TERM; touch $(UNFINISHED); \
	{ $(PIP) install $(QUIET) "$$(grep '^torch==' constraints.txt)" && \
	  $(PIP) install $(QUIET) -e '.[dev]' -c constraints.txt; } || { rm -f $(UNFINISHED); exit 1; }
	@rm -f $(UNFINISHED)
	@touch $@

demo: $(STAMP) ## edit a few facts in Gemma 3 270M and show what changed
	@$(BIN)/wise-fast demo $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/python -m ruff check $(SOURCES)
	@$(BIN)/python -m ruff format --check $(SOURCES)

# Tests use small tensors: a second worker is worth more than a second thread.
test: lint ## lint, then the test suite (ARGS="-k name" for a part, WORKERS= at once)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q -n $${WORKERS:-2} --dist loadfile $(ARGS)

test-demo: $(STAMP) ## what users see, once with the demo model (some minutes)
	@$(BIN)/python -m pytest -q -m demo tests/test_with_demo_model.py $(ARGS)

bench: $(STAMP) ## the benchmarks (ARGS= is passed on)
	@$(BIN)/python -m bench.run $(ARGS)

bench-ops: $(STAMP) ## the ops on the CPU beside plain PyTorch, about 3 minutes (ARGS= is passed on)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m bench.ops $(ARGS)

# On a machine with a GPU, that machine's Python with its torch and triton as they are: nothing is installed, nothing is
# fetched. Where $(PYTHON) has none, the environment's.
AT_HAND = $(shell $(PYTHON) -c 'import torch, triton' 2>/dev/null && echo $(PYTHON) || echo $(BIN)/python)
GPU_RUN = PYTHONPATH=.:kernels HF_HUB_OFFLINE=1 $(AT_HAND)

test-gpu: ## the kernels' tests on the GPU at hand, and compute-sanitizer; without a GPU, as far as that goes
	@$(GPU_RUN) -m bench.gpu_tests $(ARGS)

bench-gpu: ## measure the kernels on the GPU at hand, 8 minutes at most; without a GPU, a dry run
	@$(GPU_RUN) -m bench.gpu $(ARGS)

tables: $(STAMP) ## write the documents' tables from bench/results (ARGS=--check: only name those out of date)
	@$(BIN)/python -m bench.tables $(ARGS)

aot: ## compile every kernel for sm_80, sm_90, sm_100 and gfx942: registers, spills, shared memory
	@$(GPU_RUN) -m bench.aot $(ARGS)

clean: ## remove caches and build output (the environment stays)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
