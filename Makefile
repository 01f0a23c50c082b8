# Every target sets up what it needs and picks up where it stopped.
#   make demo     the main job on real data: stock against balanced, ends with a table and report.html
#   make test     the test suite; test-all: with combinations of conditions that it has one by one
#   make quality  formatting, lint, types, import contracts
#   make bench    every benchmark (about half an hour), then docs/benchmarks.md; bench-smoke: two minutes, ratios alone
PYTHON ?= python3
VENV ?= .venv
# Installed first and alone, so that no other requirement chooses a different build of it.
TORCH ?= torch==2.13.0
OUT ?= out/demo
# Processes that the tests are shared out to.
WORKERS ?= 2
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup demo test test-all quality bench bench-smoke format clean
help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -6

setup: $(VENV)/.ready

$(VENV)/.torch:
	@echo "[setup] creating the virtual environment $(VENV) and installing $(TORCH)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet "$(TORCH)" 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -W ignore -c "import torch"
	@touch $@

$(VENV)/.ready: pyproject.toml $(VENV)/.torch
	@echo "[setup] installing hf_dflop and its development tools (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --editable ".[dev]" 2>&1 | grep -v '^WARNING: Location' || true
	@$(BIN)/python -c "import hf_dflop, trl, pytest, gguf, onnx, plotly"
	@touch $@

demo: setup
	@$(BIN)/python -m recipes.demo --output-dir $(OUT)

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-all: setup
	@HF_DFLOP_EVERY_CASE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

quality: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

bench: setup
	@$(BIN)/python -m pip install --quiet --editable ".[bench]" 2>&1 | grep -v '^WARNING: Location' || true
	@OMP_NUM_THREADS=1 $(BIN)/python -m recipes.benchmarks run

bench-smoke: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m recipes.benchmarks smoke

format: setup
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	rm -rf out .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
