# Everything from a bare clone: Python >= 3.10 and make. Each target builds .venv and installs what it needs.
#   make setup | demo | test | check | notebooks | bench
# PYTHON  the interpreter that makes .venv
# TORCH   what pip installs first. The default may bring several GB of CUDA packages; name a CPU build or a wheel
#         file to choose, e.g. make test TORCH=torch==2.13.0
# NOTEBOOKS  which ones to run, e.g. make notebooks NOTEBOOKS=notebooks/03_kv_sinks.ipynb; default all
# DEMO_ARGS  for streamdiff demo, e.g. make demo DEMO_ARGS="--no-browser --port 8000"
PYTHON ?= python3
TORCH ?= torch
OUTPUTS ?= outputs
DEMO_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test test-browser check notebooks bench clean

setup: .venv/.installed-dev
	@echo "Ready. Try: $(BIN)/streamdiff run sample --prompt \"watercolour painting\" -o out.mp4"

test: .venv/.installed-dev
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# The live page in a real browser with a fake camera; needs Chromium (Debian: apt-get install chromium).
test-browser: .venv/.installed-dev
	$(BIN)/python -m pytest -q tests/browser

check: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

demo: .venv/.installed-demo
	$(BIN)/streamdiff demo $(DEMO_ARGS)

notebooks: .venv/.installed-notebooks
	$(BIN)/python notebooks/check.py $(NOTEBOOKS)

bench: .venv/.installed-base
	$(BIN)/streamdiff bench --report

clean:
	rm -rf .venv $(OUTPUTS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: set PYTHON=/path/to/python3 (tried: $(PYTHON))."; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian: apt-get install python3-venv)."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed-base: pyproject.toml | $(BIN)/python
	@echo "Installing $(TORCH) and streamdiff into .venv ..."
	@$(PIP) install -q "$(TORCH)"
	@$(PIP) install -q -e .
	@$(BIN)/python -m streamdiff_core.native_kernels
	@touch $@

.venv/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing $(TORCH) and streamdiff[$*] into .venv ..."
	@$(PIP) install -q "$(TORCH)"
	@$(PIP) install -q -e ".[$*]"
	@$(BIN)/python -m streamdiff_core.native_kernels
	@touch $@
