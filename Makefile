# Needs make and a Python >= 3.11; everything else is installed into .venv.

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The first interpreter that runs, is new enough and can make an environment. Another one: make PYTHON=/path/to/python
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$python && break; done)

DEMO := build/demo
SMOKE := build/smoke
ORDER := build/order

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two installs into one environment must not run at once.
.NOTPARALLEL:
.PHONY: help demo smoke order test lint wheel format bench hooks openmmlab constraints clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.core ## Build a dataset from drawn sample data, with its report
	$(BIN)/spctrl sample $(DEMO)/data
	LUIGI_CONFIG_PATH=configs/sample.cfg $(BIN)/luigi --module pipelines BuildDataset
	@test -f $(DEMO)/exports/report.html || { echo "No report was written; the messages above say why." >&2; exit 1; }
	@echo
	@echo "Report:   $(DEMO)/exports/report.html (open it in a browser)"
	@echo "Triplets: the folders beside it, in $(DEMO)/exports"

smoke: $(VENV)/.dev $(SMOKE)/.inputs ## Train, generate, evaluate and make tables, all in small, with random weights (minutes on a CPU)
	LUIGI_CONFIG_PATH=configs/smoke.cfg $(BIN)/luigi --module pipelines Benchmark \
		--config configs/evaluate/smoke.yaml

order: $(VENV)/.dev $(ORDER)/.inputs ## See that the benchmark puts real, noisy and shuffled images in order (trains a small network)
	LUIGI_CONFIG_PATH=configs/order.cfg $(BIN)/luigi --module pipelines Benchmark \
		--config configs/evaluate/order.yaml
	$(BIN)/python -m eval.controls check $(ORDER)/exports/benchmark-order/table.json

test: $(VENV)/.dev ## Run the tests; options: make test ARGS='-m "not slow" -n 2'
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

wheel: $(VENV)/.dev ## Build the wheel, install it elsewhere and use it there; options: make wheel ARGS=extras
	.ci/wheel $(ARGS)

format: $(VENV)/.dev ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

bench: $(VENV)/.dev ## Run the benchmarks
	$(BIN)/python -m benchmarks $(ARGS)

hooks: $(VENV)/.dev ## Install the git hooks
	$(BIN)/pre-commit install

openmmlab: ## Build .venv-openmmlab, for the mmpose backend (half an hour; options: OPENMMLAB_PYTHON=/path/to/python3.11)
	eval/openmmlab/scripts/build.sh .venv-openmmlab $(OPENMMLAB_PYTHON)

constraints: ## Resolve all packages anew into constraints.txt (several GB; options: HOLD='torch==2.12.1')
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install -q -e '.[all]' $(HOLD)
	build/constraints/bin/python -m pip check
	{ grep '^#' constraints.txt; build/constraints/bin/python -m pip freeze --exclude-editable \
		| grep -vE '^(nvidia-|cuda-|triton==)'; } > build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean: ## Remove build results and caches
	rm -rf build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## The same, and .venv
	rm -rf $(VENV)

$(VENV)/pyvenv.cfg:
	@test -n '$(PYTHON)' && '$(PYTHON)' -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Need Python >= 3.11 with venv (Debian: python3-venv), found: $(or $(PYTHON),none)." >&2; \
		echo "Name another with: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What the demo needs. A change of the versions installs again.
$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

# The tests train, generate and evaluate with tiny weights and start a Ray cluster and an S3 server: they need everything.
$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	$(PIP) install -q -c constraints.txt -e '.[all]'
	@touch $@ $(VENV)/.core

# The drawn sample and random weights.
$(SMOKE)/.inputs: | $(VENV)/.dev
	$(BIN)/spctrl sample $(SMOKE)/data
	$(BIN)/spctrl tiny-weights $(SMOKE)/weights
	@touch $@

# A small pose network, images that it has not seen, and methods whose order is known.
$(ORDER)/.inputs: | $(VENV)/.dev
	$(BIN)/python -m eval.vitpose.small $(ORDER)/small
	$(BIN)/python -m eval.controls write $(ORDER)/small/unseen/AP-10K $(ORDER)/controls
	@touch $@
