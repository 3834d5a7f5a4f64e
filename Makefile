# make quickstart   fine-tune a real chat model in 4 bits, in about four minutes
# make test         every check and every quick test
# The rest: setup, check, test-slow, bench, docs, clean.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# As in cli.py: torch's threads share the cores with whatever else runs.
export GOMP_SPINCOUNT ?= 1000

.PHONY: setup quickstart test test-slow check bench docs clean

setup: $(STAMP)
	@$(BIN)/halfbyte doctor --line

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	touch $@

quickstart: setup
	$(BIN)/python examples/quickstart.py

test: check
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m slow

check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/update_help.py --check

bench: setup
	$(BIN)/halfbyte bench kernels

docs: setup
	$(BIN)/python docs/update_help.py

clean:
	rm -rf $(VENV) build
