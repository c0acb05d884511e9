# One virtual environment serves every target; it is made once and again when the pins change.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: install format lint types imports test bench bench-gpu fuzz run demo check
.DEFAULT_GOAL := check

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[trainer,dev]"
	touch $@

format: install
	$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .
lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
types: install
	$(BIN)/mypy
imports: install
	$(BIN)/lint-imports
test: install
	$(BIN)/python -m pytest --cov -n 2 --dist loadfile
bench: install
	$(BIN)/python -m pytest -m slow
bench-gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/medley bench speed --device cuda --out runs/speed-gpu
fuzz: install
	$(BIN)/python -m tests.fuzz
run: install
	$(BIN)/medley serve
demo: install
	$(BIN)/python demo/run.py
check: lint types imports test
