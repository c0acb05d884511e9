# One virtual environment serves every target; it is made once and again when the pins change.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3

.PHONY: install servers format lint types imports test bench bench-gpu fuzz run demo check image image-test
.DEFAULT_GOAL := check

install: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[trainer,dev]"
	touch $@

# Redis, Prometheus and others that tests start: installed by apt where they are missing.
servers:
	@tests/servers

format: install
	$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format .
lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
types: install
	$(BIN)/mypy
imports: install
	$(BIN)/lint-imports
test: install servers
	$(BIN)/python -m pytest --cov -n 3 --dist loadfile --no-loadscope-reorder
bench: install servers
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

# `make image DEVICE=cpu TORCH_INDEX_URL=...`; BUILD="buildah bud --format docker" needs no engine (docs/containers.md).
BUILD ?= docker build
DEVICE ?= cuda
TORCH_INDEX_URL ?=
IMAGE_ARGS = --build-arg DEVICE=$(DEVICE) --build-arg TORCH_INDEX_URL=$(TORCH_INDEX_URL) $(BUILD_FLAGS)
image:
	$(BUILD) $(IMAGE_ARGS) --target service --tag medley:$(DEVICE) .
	$(BUILD) $(IMAGE_ARGS) --target trainer --tag medley-trainer:$(DEVICE) .
image-test: install
	$(BIN)/python -m deploy.container.image_test --build-flags="$(BUILD_FLAGS)" $(IMAGE_TEST_FLAGS)
