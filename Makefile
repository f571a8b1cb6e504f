# Every command a person or a machine needs; `make` alone lists them.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help install demo test test-slow test-slurm test-layouts gpu-check bench bench-check check wheel clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with the tested versions (GPU nodes: CONSTRAINTS=constraints-cuda.txt)

# The stamp makes a second call instant; a change of the pins or of the project's needs installs again.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	$(BIN)/python -m pip install -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

# PYTHON=... names the interpreter; else it is the first of the usual names that is a supported version.
$(BIN)/pip:
	@for python in $(or $(PYTHON),python3.11 python3 python3.12); do \
		$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2> /dev/null || continue; \
		echo "creating .venv with $$($$python --version)"; \
		if $$python -m venv --clear .venv; then exit 0; fi; \
		rm -rf .venv; \
		echo "error: $$python can't create a virtual environment; on Debian or Ubuntu install python3-venv (as root: apt-get install python3-venv), then run make again" >&2; \
		exit 1; \
	done; \
	echo "error: no Python 3.11 or 3.12 found; install one, or name it: make install PYTHON=/path/to/python3.11" >&2; \
	exit 1

demo: install ## train, evaluate and sample a small model; TEXT=path for a text of your own
	@$(BIN)/infini-train demo $${TEXT:+--text "$$TEXT"}

test: install ## the test suite
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

test-slow: install ## the tests that take long
	$(BIN)/python -m pytest -q -m 'slow and not slurm'

test-slurm: install ## jobs on a private Slurm cluster (Debian, Ubuntu: apt-get install slurm-wlm slurmdbd mariadb-server-core mariadb-client-core munge shellcheck)
	$(BIN)/python -m pytest -q -n 4 --dist worksteal -m slurm tests/launch

test-layouts: install ## the parallel layouts that make test leaves out, against one process, up to 8 processes
	$(BIN)/python -m pytest -q -m layouts tests/selftest/test_layouts.py tests/train/test_relayout.py

gpu-check: ## what the GPUs of this machine compute, how fast, and whether as planned; at most 15 minutes (after make install CONSTRAINTS=constraints-cuda.txt)
	$(BIN)/python benchmarks/gpu_check.py

bench: install ## how fast layers and steps are on this machine's CPU: docs/results/performance.md, some 20 minutes on 2 idle cores
	$(BIN)/python benchmarks/performance.py

bench-check: install ## whether what must be faster still is, in some three minutes
	$(BIN)/python benchmarks/performance.py --check

# What benchmarks may do: they are read once in a while, and call code whose types are not all known.
UNASKED := arg-type assignment attr-defined import-untyped name-defined no-untyped-call operator unused-ignore var-annotated

check: install ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks $(addprefix --disable-error-code=,$(UNASKED)) # that they call what is there

wheel: install ## build dist/infini_train-*.whl
	$(BIN)/python -m build --wheel

clean: ## remove caches and build output; .venv and runs/ stay
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
