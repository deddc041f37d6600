# `make` lists the targets. Every target that runs something sets up its environment first; an environment
# that is already complete costs about a tenth of a second.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory --no-builtin-rules

# The active virtual environment when there is one, else .venv in this folder.
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PY := $(VENV)/bin/python
PINS := constraints.txt
TORCH := $(shell grep -m1 '^torch==' $(PINS))

# The stamp is named after what the environment is made from and for which checkout (an editable install points
# at one folder), so that a changed file, or another checkout sharing the environment, installs again.
SOURCES := pyproject.toml $(PINS) setup.py $(shell find csrc -type f | sort)
KEY := $(shell { cat $(SOURCES); echo '$(CURDIR)'; } | cksum | tr ' ' '-')
STAMP := $(VENV)/.condense-setup-$(KEY)

# In a checkout the CUDA half is built where it can run; wheels always have it (setup.py lists the variables).
CUDA_WANTED := $(CONDENSE_CUDA)
export CONDENSE_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,0)

CORPUS ?=
KVPRESS ?=
PYTEST_ARGS ?=
# Each worker of pytest is a process of one thread (tests/conftest.py) that loads torch: a core each, eight at most.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
# Workers that have finished take tests from the others.
PYTEST = "$(PY)" -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help setup ext demo test test-slow lint lint-ruff lint-mypy lint-cxx format tiny wheel bench-cpu gpu gpu-train

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## install into the active virtual environment, or into .venv

$(PY):
	@for python in python3.12 python3.11 python3; do \
	    command -v $$python >/dev/null || continue; \
	    $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	        || continue; \
	    echo "creating $(VENV) with $$python"; \
	    exec $$python -m venv "$(VENV)"; \
	done; \
	echo "error: no Python >= 3.11 with the venv module: python3.12, python3.11 and python3 were tried;" \
	    "install one (on Debian or Ubuntu: apt install python3 python3-venv)" >&2; \
	exit 2

# torch goes first and alone: its exact version decides which build (CPU or CUDA) and which triton are taken.
$(STAMP): | $(PY)
	@"$(PY)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(VENV) has $$("$(PY)" -V), expected Python >= 3.11: remove or deactivate it" >&2; exit 2; }
	@rm -f "$(VENV)"/.condense-setup-*
	"$(PY)" -m pip install --quiet 'pip>=25.1'
	"$(PY)" -m pip install --quiet -c $(PINS) $(TORCH)
	"$(PY)" -m pip install --quiet -c $(PINS) -e '.[dev,train,models,serve,ray,neurons]'
	@touch "$(STAMP)"

ext: setup ## compile what has changed in csrc again
	@"$(PY)" setup.py --quiet build_ext --inplace

demo: setup ## give SmolLM2 a text of 6,700 characters in every way and ask it six questions
	@"$(VENV)/bin/condense" demo

test: setup ## run the tests that every change must pass (PYTEST_ARGS="-k name" passes options on)
	@$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: setup ## run the slow rest: compilation for six targets, sanitizers over all cases
	@$(PYTEST) -m slow $(PYTEST_ARGS)

CXX_SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

lint: lint-ruff lint-mypy lint-cxx ## check style, docstrings, types and formatting (lint-ruff, ...: one of them)

lint-ruff: setup
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

lint-mypy: setup
	"$(PY)" -m mypy

lint-cxx: setup
	"$(VENV)/bin/clang-format" --dry-run --Werror $(CXX_SOURCES)

format: setup ## let ruff repair and format the sources
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .
	"$(VENV)/bin/clang-format" -i $(CXX_SOURCES)

tiny: setup ## train the embedded model again (needs CORPUS=path/to/train.jsonl.xz)
	@[[ -r "$(CORPUS)" ]] || { \
	    echo "error: CORPUS='$(CORPUS)' is no readable file, expected make tiny CORPUS=path/to/train.jsonl.xz" >&2; \
	    exit 2; }
	"$(PY)" -m condense_core.training.tiny --corpus "$(CORPUS)"

wheel: setup ## build sdist and wheel into dist, check them, try the wheel in an empty environment
	@CONDENSE_CUDA="$(or $(CUDA_WANTED),auto)" PYTHON="$(PY)" .ci/wheel

bench-cpu: ext ## measure what docs/ prints of a CPU; writes bench/results and tables (10 quiet minutes; KVPRESS=its python)
	"$(PY)" -m bench.cpu $(if $(KVPRESS),--kvpress "$(KVPRESS)")
	"$(PY)" -m bench.tables --plots

# Sets nothing up: a machine lent for its GPU may have no network, and its own torch.
gpu: ## test and measure the kernels on this machine's GPU; writes bench/results (STEPS="build test sanitize bench" ONLY=regex)
	@bench/gpu.sh

# As little as above: the model's wheel is given where there is no network.
gpu-train: ## train SmolLM2's compressors on this machine's GPU (CORPUS=..., WHEEL=..., STEPS=4000 WHAT="pool mixed eval")
	@PY="$(or $(wildcard $(PY)),python3)" tools/train_smollm2.sh $(WHAT)
