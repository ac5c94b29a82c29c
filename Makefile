# trihybrid: everything from a bare checkout. `make` lists the commands.
# Needs GNU make and Python 3.11 or newer; each command may be run again at any time.

PYTHON ?= python3
VENV := .venv
LOWEST := .venv-transformers-lowest
NEWEST := .venv-transformers-newest
TRITON := .venv-triton
EXTRAS := .venv-extras
# The lower bound in pyproject.toml; a test holds the two together.
LOWEST_TRANSFORMERS := 5.17.0
TRANSFORMERS_TESTS := $(wildcard tests/models tests/laws tests/surgery tests/distill)
# pip would compile every module of every package; what is imported is compiled then, wherever that was forbidden.
PIP_INSTALL := -m pip --disable-pip-version-check -q install --no-compile -c constraints.txt
export PYTHONDONTWRITEBYTECODE :=
# Two processes; the tests of a file stay together, so that they share what they set up.
PYTEST := -m pytest -q -n 2 --dist loadfile --durations=10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-long demo lint test-transformers test-triton browser-test clean

help: ## this list
	@echo "usage: make COMMAND [PYTHON=python3.12]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)$$/  \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## create .venv and install trihybrid into it, with its tests
	@echo "$(VENV) is ready"

test: setup ## run the tests
	@echo "testing: pytest, with the ten slowest tests at the end"
	@$(VENV)/bin/python $(PYTEST)

test-long: setup $(EXTRAS)/.installed ## the tests that `make test` leaves out: more processes and extras, benchmarks in small
	@echo "testing: what takes long"
	@$(VENV)/bin/python $(PYTEST) -m long
	@echo "testing: what needs torchao or transformers serve"
	@$(EXTRAS)/bin/python $(PYTEST) -m long tests/infer/test_weights.py tests/infer/test_transformers_serve.py

demo: setup ## teacher, surgery, distillation, report, on this machine
	@echo "running the demo"
	@$(VENV)/bin/trihybrid demo

lint: $(VENV)/.installed-dev ## ruff check, ruff format --check, mypy
	@echo "linting: ruff check"
	@$(VENV)/bin/ruff check
	@echo "linting: ruff format"
	@$(VENV)/bin/ruff format --check
	@echo "linting: mypy"
	@$(VENV)/bin/mypy

test-transformers: $(LOWEST)/.installed $(NEWEST)/.installed ## test the lowest and the newest transformers that we allow
	@$(LOWEST)/bin/python $(PIP_INSTALL) "transformers==$(LOWEST_TRANSFORMERS)"
	@echo "testing with the lowest transformers: $$($(call version,$(LOWEST),transformers))"
	@$(LOWEST)/bin/python $(PYTEST) $(TRANSFORMERS_TESTS)
	@$(NEWEST)/bin/python $(PIP_INSTALL) --upgrade "transformers<6"
	@echo "testing with the newest transformers: $$($(call version,$(NEWEST),transformers))"
	@$(NEWEST)/bin/python $(PYTEST) $(TRANSFORMERS_TESTS)

test-triton: $(TRITON)/.installed ## run the Triton kernels in Triton's interpreter, on the CPU
	@echo "testing the Triton kernels with Triton $$($(call version,$(TRITON),triton)), interpreted"
	@TRITON_INTERPRET=1 $(TRITON)/bin/python $(PYTEST) -m triton tests/ops tests/infer/kernels tests/benchmarks

browser-test: setup ## open the report in a headless Chromium
	@echo "testing: the report in a browser"
	@$(VENV)/bin/python $(PYTEST) -m browser tests/browser

clean: ## remove the environments, builds and caches; runs/ stays
	@echo "removing environments, builds and caches"
	@rm -rf $(VENV) $(EXTRAS) $(LOWEST) $(NEWEST) $(TRITON) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

version = $(1)/bin/python -c 'from importlib.metadata import version; print(version("$(2)"))'

# $(call environment,FOLDER): a fresh-enough virtual environment with torch in it. Torch goes first and
# alone, with its constraint: any other order could fetch gigabytes of CUDA for a machine without a GPU.
define environment
	@command -v $(PYTHON) >/dev/null || { \
	  echo "no '$(PYTHON)' here; name a Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "trihybrid needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	    "name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "creating $(1) with $$($(PYTHON) --version 2>&1)"
	@$(PYTHON) -m venv $(1) || { \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu it is in the package python3-venv"; exit 1; }
	@echo "installing torch into $(1)"
	@$(1)/bin/python $(PIP_INSTALL) torch
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	@echo "installing trihybrid and its test tools into $(VENV)"
	@$(VENV)/bin/python $(PIP_INSTALL) -e ".[test]"
	@touch $@

# Where torchao is installed, transformers imports it in every process, which takes seconds and writes warnings.
$(EXTRAS)/.installed: pyproject.toml constraints.txt
	$(call environment,$(EXTRAS))
	@echo "installing trihybrid, its test tools and its extras into $(EXTRAS)"
	@$(EXTRAS)/bin/python $(PIP_INSTALL) -e ".[test,quantize,transformers-serving]"
	@# Compiled in a test, its invalid escapes would be errors, as all warnings are there.
	@$(EXTRAS)/bin/python -W ignore -c 'import torchao.quantization' 2>/dev/null
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing ruff, mypy and pre-commit into $(VENV)"
	@$(VENV)/bin/python $(PIP_INSTALL) -e ".[test,dev]"
	@touch $@

$(LOWEST)/.installed: pyproject.toml constraints.txt
	$(call environment,$(LOWEST))
	@echo "installing trihybrid with transformers $(LOWEST_TRANSFORMERS) into $(LOWEST)"
	@$(LOWEST)/bin/python $(PIP_INSTALL) "transformers==$(LOWEST_TRANSFORMERS)" -e ".[test]"
	@touch $@

$(NEWEST)/.installed: pyproject.toml constraints.txt
	$(call environment,$(NEWEST))
	@echo "installing trihybrid with the newest transformers into $(NEWEST)"
	@$(NEWEST)/bin/python $(PIP_INSTALL) -e ".[test]"
	@touch $@

# A CPU build of torch brings no Triton: 0.7 GB, so it has an environment of its own. Triton 3.6 is the one of torch 2.11
# on a GPU, and its interpreter turns arrays of one element into scalars, which numpy refuses from 2.3 on.
$(TRITON)/.installed: pyproject.toml constraints.txt
	$(call environment,$(TRITON))
	@echo "installing trihybrid, Triton and an older numpy into $(TRITON)"
	@$(TRITON)/bin/python $(PIP_INSTALL) "triton==3.6.*" "numpy<2.3" -e ".[test]"
	@touch $@
