# `make help` lists the targets. Those that run something set up what they need in .venv: dependencies and
# the native build. gpu-check alone uses what the machine has.
PYTHON ?= python3
VENV ?= .venv
OUT ?= runs
DEMO_FLAGS ?=
TEST_FLAGS ?=
GPU_STEPS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint format resources bench results gpu-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## virtual environment, dependencies, native build

$(STAMP): pyproject.toml setup.py CMakeLists.txt requirements.txt requirements-build.txt $(shell find csrc -type f)
	@# Debian's python3 comes without ensurepip; virtualenv brings its own pip.
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); $(PYTHON) -m pip install --quiet --target .virtualenv virtualenv \
	  && PYTHONPATH=.virtualenv $(PYTHON) -m virtualenv --quiet $(VENV); }
	@# Compiling takes most of the time, so it runs while the rest is downloaded; the install finds what it made,
	@# or says what failed.
	$(BIN)/python -m pip install --quiet -r requirements-build.txt
	$(BIN)/python setup.py --quiet build_ext >/dev/null 2>&1 & compiling=$$!; \
	  $(BIN)/python -m pip install --quiet -r requirements.txt; status=$$?; wait $$compiling; exit $$status
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $(STAMP)

demo: setup  ## train on scikit-learn's digits with several rules at one budget, about a minute
	$(BIN)/emp-fast demo --output $(OUT)/demo $(DEMO_FLAGS)

test: setup  ## the whole test suite
	$(BIN)/python -m pytest $(TEST_FLAGS)

lint: setup  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: setup  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

resources: setup  ## compile every kernel for its architectures; check registers, spills, load widths
	mkdir -p $(OUT)
	PYTHONPATH=tests $(BIN)/python -m machine_code --output $(OUT)/resources.md

bench: setup  ## the CPU benchmark: a JSON file, a table and a plot in $(OUT)/bench
	mkdir -p $(OUT)/bench
	$(BIN)/python -m pytest benchmarks --benchmark-json=$(OUT)/bench/cpu.json
	$(BIN)/python -m benchmarks.report $(OUT)/bench/cpu.json -o $(OUT)/bench

results: setup  ## the committed pages of results again, from the committed JSON; measures nothing
	$(BIN)/python -m benchmarks.committed

gpu-check:  ## on a machine with a GPU: build, GPU tests, sanitizer, GPU benchmark into $(OUT)/gpu; installs nothing
	PYTHON=$(PYTHON) tests/gpu/check.sh $(OUT)/gpu $(GPU_STEPS)

clean:  ## remove what was built
	rm -rf build dist *.egg-info $(VENV) emp_fast/_native*.so emp_fast/_build_info.json
