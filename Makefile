# One command each; everything is installed into .venv, and again only when the files that say what to install change.
PYTHON ?= python3
NPROC ?= 2
TRAIN ?= --compare default
WORKERS ?= 2
BENCH ?= --output runs/federated/federated.json
SIMULATORS := pfl==0.6.0 fedlab==1.3.0 flwr[simulation]==1.41.0
QUIETLY := --disable-pip-version-check --no-input -q

BIN := .venv/bin
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard */__init__.py))

# The root holds folders named like modules elsewhere (`compression` is in Python 3.14's library): keep it off sys.path.
export PYTHONSAFEPATH := 1

.PHONY: help train results bench-federated test test-products test-deepspeed test-trainers lint types setup hooks gpu-check clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: setup ## Train a small model under 2 workers, once for each of eight ways to average gradients
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) --no-python $(BIN)/gradwire train $(TRAIN)

results: TRAIN += --results bench/results/train.json
results: train ## The same, kept in bench/results and shown in the README
	$(BIN)/gradwire report --write

bench-federated: .venv-federated/installed ## Install other simulators of federated training, and race them: 20 minutes
	.venv-federated/bin/gradwire bench federated $(BENCH)

# Some pin what gradwire's own tools need newer: they get an environment of their own. One that cannot be had is left out.
.venv-federated/installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv-federated
	.venv-federated/bin/python -m pip install $(QUIETLY) -c constraints.txt -e '.[bench]'
	for package in $(SIMULATORS); do \
		.venv-federated/bin/python -m pip install $(QUIETLY) -c constraints.txt "$$package" || echo "without $$package" >&2; \
	done
	@touch $@

test: lint types ## Lint, types, layers and every test
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

test-products: setup ## Train every legal product of compressor, feedback and exchange on 2 ranks: minutes
	GRADWIRE_PRODUCTS=all $(BIN)/pytest -m slow tests/test_products.py

test-trainers: setup ## Train inside transformers, accelerate and Lightning, which it installs: a minute
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -q -c constraints.txt -e '.[trainers]'
	$(BIN)/pytest tests/test_trainers.py

test-deepspeed: .venv/deepspeed ## Install DeepSpeed into .venv, for the CPU, and run its tests
	$(BIN)/pytest tests/test_deepspeed.py

# Nothing of it is compiled: it compiles what is used, when it is used.
.venv/deepspeed: .venv/installed
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(BIN)/python -m pip install --disable-pip-version-check --no-input \
		-c constraints.txt -e '.[deepspeed]'
	@touch $@

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Types (mypy --strict) and layers (import-linter)
	$(BIN)/mypy
	PYTHONPATH=.venv/tree $(BIN)/lint-imports

setup: .venv/installed ## Create .venv and install gradwire and its tools

hooks: setup ## Run the quick checks before every commit
	$(BIN)/pre-commit install

.venv/installed: pyproject.toml constraints.txt src/gradwire/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'gradwire: expected Python 3.11 or later, got "$(PYTHON)". Name another: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	@# The packages under their import names, for tools that read files and do not run Python.
	rm -rf .venv/tree && mkdir -p .venv/tree/gradwire
	ln -s $(addprefix ../../../,$(PACKAGES)) $(addprefix ../../../,$(wildcard src/gradwire/*.*)) .venv/tree/gradwire
	@touch $@

gpu-check: ## On a machine with CUDA and torch, offline: install for its own python3, run GPU tests and benches
	$(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	$(PYTHON) -m gradwire.bench.gpu_check

clean: ## Remove what the targets made, .venv included
	rm -rf .venv .venv-federated build dist *.egg-info
