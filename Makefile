# Set-up happens by itself: every target that needs the virtual environment makes it first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A core has no work while its test waits for a process, so there are more workers than cores.
WORKERS := $(shell echo $$(( $$(nproc) + 2 )))
# Each worker, and each of the hundreds of interpreters that tests start, would else compile all it imports of the tree.
unexport PYTHONDONTWRITEBYTECODE
SCRIPTS := cda_cli/page/scripts tests/page/walk.js
STYLE := cda_cli/page/style.css

.PHONY: help setup demo check test test-gpu compile-kernels reliability lint format bench bench-gpu evidence docs clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## Make the virtual environment with the pinned versions

$(READY): requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "cda needs Python 3.10 or later; call make with PYTHON=/path/to/python3.10"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: setup ## Train, evaluate, sample from and inspect a small model, in about a minute on two cores
	$(BIN)/cda train --out runs/demo --steps 250
	$(BIN)/cda eval runs/demo --max-batches 20
	$(BIN)/cda sample runs/demo --prompt "def " --max-new-tokens 200
	$(BIN)/cda inspect-sparsity runs/demo --max-batches 4
	@echo
	@echo "The run is in runs/demo. Call the command as $(BIN)/cda, or as cda after: source $(BIN)/activate"

check: lint ## Check style and types, and run the tests that are quick, in about a minute
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test: setup ## Run all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-gpu: setup ## Run the tests of the operator, its kernels, the model, generation, training and inspection on a GPU
	$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("make test-gpu needs a CUDA device")'
	$(BIN)/python -m pytest -n 8 tests/ops tests/model tests/generation tests/training tests/inspection tests/test_runtime.py tests/test_diagnosis.py

compile-kernels: setup ## Compile every kernel variant for sm_80 and sm_90, without a GPU (three to four hours of one core)
	TRITON_INTERPRET=0 $(BIN)/python benchmarks/compile_kernels.py

reliability: setup ## Try to break each promise of docs/reliability.md many times, and rewrite its table
	$(BIN)/python -m tests.reliability

lint: setup ## Check the style of Python, JavaScript and CSS, and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/oxlint --quiet $(SCRIPTS)
	$(BIN)/oxfmt --check $(SCRIPTS) $(STYLE)

format: setup ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/oxfmt $(SCRIPTS) $(STYLE)

evidence: setup ## Rerun the experiments of benchmarks/evidence: in full on a GPU, reduced on a CPU (some 15 minutes)
	$(BIN)/python benchmarks/evidence.py

docs: setup ## Rewrite the generated parts of the docs, the sample page too
	$(BIN)/python docs/generate.py

bench: setup ## Measure speed on this CPU: tables for benchmarks/results
	$(BIN)/python benchmarks/cpu.py
	$(BIN)/python benchmarks/decoding.py

bench-gpu: setup ## Measure speed and memory on a GPU: tables for benchmarks/results
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/distributed.py

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
