# make demo, make test: everything from nothing, in .venv; a second call reuses what is there. make help lists the rest.
# PYTHON chooses the interpreter that .venv is made from; ARGS goes to the demo and to the checks, PYTEST_ARGS to pytest
# (-n 0 runs all tests in one process).
PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
SETUP := $(PYTHON) tools/environment.py
CXX_SOURCES = $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# gpu-check runs where there may be no network and no .venv: a PYTHON that was asked for, else .venv, else python3.
CHOSEN := $(filter command environment,$(firstword $(origin PYTHON)))
GPU_PYTHON = $(if $(CHOSEN),$(PYTHON),$(shell $(VENV_PYTHON) -c 1 2>/dev/null && echo $(VENV_PYTHON) || echo $(PYTHON)))

.PHONY: help demo test build lint format docs gates gpu-check bench clean distclean

help:
	@echo "make demo       set up, build, then encode real text padded and padding-free (ARGS='--json')"
	@echo "make test       set up, build, then every quick test that this machine can run (PYTEST_ARGS='-k packing', --slow)"
	@echo "make build      set up and compile what changed"
	@echo "make lint       formatters, linter and type checker; make format applies the formatters"
	@echo "make docs       builds the site of docs/ in build/docs, from the sources alone (ARGS='--dirty')"
	@echo "make gates      reads the built binary: architectures, stack, tensor-core instructions"
	@echo "make gpu-check  on a machine with a GPU, from a built tree: every op, test and benchmark (ARGS='--budget 270')"
	@echo "make bench      times every op and model beside its peers, rows to bench/results (ARGS='-k attention')"
	@echo "make clean      removes what was built; make distclean removes .venv too"

# The emulator of kernels is for tests: the demo does without.
demo:
	@WARPFORM_SIMT=$${WARPFORM_SIMT:-0} $(SETUP) run build
	@$(VENV_PYTHON) -m warpform demo $(ARGS)

test:
	@$(SETUP) run test build
	@$(VENV_PYTHON) -m pytest $$($(VENV_PYTHON) tools/test_workers.py) $(PYTEST_ARGS)

build:
	@$(SETUP) run build

lint:
	@$(SETUP) run lint
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/clang-format --dry-run -Werror $(CXX_SOURCES)
	@echo "lint: clean"

format:
	@$(SETUP) run lint
	@$(VENV_PYTHON) -m ruff check --fix --quiet . || true
	@$(VENV_PYTHON) -m ruff format .
	@.venv/bin/clang-format -i $(CXX_SOURCES)

# The theme's makers announce the end of its support in each build. A warning of the build itself is an error.
docs:
	@$(SETUP) docs
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet $(ARGS)
	@echo "docs: build/docs/index.html; $(VENV_PYTHON) -m http.server -d build/docs serves them with their search"

# The gates are about what a wheel holds: all architectures, no emulator.
gates:
	@WARPFORM_CUDA_ARCHS="80;90a-real" WARPFORM_SIMT=0 $(SETUP) run test build
	@$(VENV_PYTHON) tools/gates.py

gpu-check:
	@$(GPU_PYTHON) tools/gpu_check $(ARGS)

bench:
	@$(SETUP) run bench build
	@$(VENV_PYTHON) -m warpform bench $(ARGS)

clean:
	@rm -rf build dist python/*.egg-info python/warpform/*.so

distclean: clean
	@rm -rf .venv
