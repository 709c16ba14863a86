# Two commands do all the set-up on a machine with Python, a C++ compiler and a package registry:
#   make tune   tunes the kernels for this machine, compares them with torch and exports them to build/
#   make test   lint, types, and every behaviour once; `make test-all` adds full matrices and long runs
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install -c constraints.txt -e
# Processes share the test files, one process a core.
PYTEST = $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile
CACHE := build/cache
PACK := build/kernels.mhcpack
# The single ops and a layer; compiling a stack of layers with torch takes minutes (`mhc-tune bench --op stack`).
COMPARED := $(foreach op,project coefficients aggregate merge pre layer,--op $(op)) --direction forward --direction both
PROBLEM := --target auto --streams 4 --width 1280 --tokens 2048 --dtype bfloat16 --dtype float32

# On a machine with an NVIDIA GPU: tests, tunes and measures, the most telling first; the same command goes on.
# Without .venv (a machine without a package registry) it runs the Python that is there.
GPU_SECONDS ?= 1500
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: tune check test test-slow test-all gpu clean
.DELETE_ON_ERROR:

tune: .venv/installed
	mkdir -p build
	$(BIN)/mhc-tune tune $(PROBLEM) --seconds 480 --cache $(CACHE)
	$(BIN)/mhc-tune export $(PACK) --cache $(CACHE)
	$(BIN)/mhc-tune bench $(PROBLEM) $(COMPARED) --cache $(CACHE) --json > build/bench.json
	@echo "kernels: $(PACK)   measurements: build/bench.json   cache: $(CACHE)"

check: .venv/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(PYTEST) -m "not slow"

test-slow: .venv/installed-for-tests
	$(PYTEST) -m slow

test-all: test test-slow

gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m cli.main gpu --seconds $(GPU_SECONDS)

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[peers]'
	touch $@

.venv/installed-for-tests: .venv/installed
	$(INSTALL) '.[test,plot,postgres]'
	touch $@

clean:
	rm -rf .venv build
