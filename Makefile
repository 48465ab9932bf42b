# make demo    a real Gemma writes text through this package
# make test    all tests; those of a GPU skip themselves without one
# make lint    ruff, mypy, and tables that are still what the records say
# make bench   a few cases timed on this machine, about a minute or two
# make speed   the eager backend against PyTorch's own attention, products and sampling on this CPU
#
# Each sets up .venv first, if it is not there or its inputs have changed.
#
# make gpu-check   everything that one wants to know of a machine with a GPU: builds, tests, validates, sanitizes, benchmarks,
#                  writes a record. It uses the Python and the torch that are there, and no network.

PYTHON ?= python3
PIP_TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup modules demo test test-plain test-interpreted lint bench speed gpu-check clean

setup: $(READY)

# torch comes first, because everything else depends on it, and audibly, because it is by far the largest download: the
# builds for Linux in the public index carry CUDA (several GB). PIP_TORCH takes other options for it: an index or a folder
# with a CPU build, for instance.
$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off $(PIP_TORCH) --constraint constraints.txt torch==$(shell sed -n 's/^torch==//p' constraints.txt) numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# The compiled modules, after a change in csrc/; without compilers it says so and is content.
modules: $(READY)
	$(BIN)/python csrc/build.py

# mypy sees the package as it installs, with reference/ and bench/ inside.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/gemma4_kernels
	ln -s $(CURDIR)/gemma4_kernels/* $(CURDIR)/reference $(CURDIR)/bench build/types/gemma4_kernels/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml
	$(BIN)/python -m gemma4_kernels.bench.report --check

demo: $(READY)
	$(BIN)/python examples/write_text.py

# Triton's kernels are compiled in one process and interpreted in another: which of the two is settled when Triton is imported.
test: modules
	$(MAKE) --jobs=2 --output-sync=target test-plain test-interpreted

test-plain: modules
	$(BIN)/python -m pytest

test-interpreted: $(READY)
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/attention/triton_backend tests/linear/triton_backend \
		tests/norms/triton_backend tests/verification/triton_backend

bench: $(READY)
	$(BIN)/gemma4-kernels bench --quick

gpu-check:
	$(PYTHON) scripts/gpu_check.py

speed: $(READY)
	$(BIN)/python -m gemma4_kernels.bench.eager_attention
	$(BIN)/python -m gemma4_kernels.bench.eager_linear
	$(BIN)/python -m gemma4_kernels.bench.eager_verification
	$(BIN)/python -m gemma4_kernels.bench.eager_generation

clean:
	rm -rf $(VENV) build dist *.egg-info gemma4_kernels/*.so
