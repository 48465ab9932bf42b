# make demo    a real Gemma writes text through this package
# make test    all tests; those of a GPU skip themselves without one
# make lint    ruff and mypy
# make speed   the eager backend against PyTorch's own attention on this CPU
#
# Each sets up .venv first, if it is not there or its inputs have changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test lint speed clean

setup: $(READY)

# torch comes first and pinned: left to a dependency, pip would fetch the newest build with several GB of CUDA.
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==$(shell sed -n 's/^torch==//p' constraints.txt) numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/write_text.py

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

speed: $(READY)
	$(BIN)/python -m gemma4_kernels.bench.eager_attention

clean:
	rm -rf $(VENV) build dist *.egg-info
