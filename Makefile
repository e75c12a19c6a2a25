# make setup      virtual environment in .venv with everything, from constraints.txt
# make testbed    four clients, server and aggregator on this machine fine-tune a real model
# make check      format, lint, types, contract, import rules
# make test       all tests that need no container engine
# make test-compose  images and docker-compose.yml for real; needs a container engine
# make generate   lesft/v1 from proto/
.PHONY: setup testbed check test test-compose generate format clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done

setup: $(STAMP)

# torch goes first and by its exact version: a range would pull the newest build and its CUDA
# packages on machines that have a CPU build at hand.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "LESFT needs Python 3.10 or newer; choose one with make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

testbed: setup
	$(BIN)/lesft-testbed run --output runs/testbed

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code proto
	$(BIN)/python tools/generate.py --check
	$(BIN)/lint-imports

# Two at a time; tests of recovery mostly wait for processes to start and to find each other: three.
test: setup
	$(BIN)/python -m pytest --ignore=tests/recovery --numprocesses=2 --dist=worksteal
	$(BIN)/python -m pytest tests/recovery --numprocesses=3

test-compose: setup
	$(BIN)/python -m tests.compose

generate: setup
	$(BIN)/python tools/generate.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write proto

clean:
	rm -rf $(VENV) build dist *.egg-info
