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
# What ends a layer, and a whole one: torch compiles these in a minute or two. `mhc-tune bench` alone compares everything.
COMPARED := $(foreach op,merge layer,--op $(op)) --direction both \
	$(foreach impl,tuned default eager compile,--impl $(impl))
# What the paper's mHC runs; single pass and the identity are other models.
TUNED := $(foreach op,aggregate merge coefficients project pre step,--op $(op))
PROBLEM := --target auto --streams 4 --width 1280 --tokens 2048 --dtype bfloat16 --dtype float32

# On a machine with an NVIDIA GPU: tests, tunes and measures, the most telling first; the same command goes on.
# Without .venv (a machine without a package registry) it runs the Python that is there.
GPU_SECONDS ?= 1500
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: tune check test test-slow test-all gpu clean
.DELETE_ON_ERROR:

define NEXT
kernels: $(PACK)   measurements: build/bench.json, build/tune.json   cache: $(CACHE)
next:
  $(BIN)/python -c 'import mhc; mhc.load_kernels("$(PACK)")'
  $(BIN)/mhc-tune explain $(PACK) --op merge --width 1280 --tokens 2048
  $(BIN)/mhc-tune report --cache $(CACHE) -o build/report.html
endef
export NEXT

# The default schedules that the search compiles are kept in the cache, where the comparison finds them.
tune: export MHC_TUNE_CACHE := $(CURDIR)/$(CACHE)
tune: .venv/installed
	@mkdir -p build
	$(BIN)/mhc-tune tune $(PROBLEM) $(TUNED) --seconds 110 --cache $(CACHE) --json > build/tune.json
	$(BIN)/mhc-tune export $(PACK) --cache $(CACHE)
	$(BIN)/mhc-tune bench $(PROBLEM) $(COMPARED) --cache $(CACHE) --json > build/bench.json
	@if $(BIN)/python -c 'import matplotlib' 2> /dev/null; then \
		$(BIN)/python -m cli.maintain.plot_results speedup build build/bench.png && echo "chart: build/bench.png"; fi
	@echo "$$NEXT"

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
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m cli.main gpu --seconds $(GPU_SECONDS)

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[peers,plot]'
	touch $@

.venv/installed-for-tests: .venv/installed
	$(INSTALL) '.[test,plot,postgres]'
	touch $@

clean:
	rm -rf .venv build
