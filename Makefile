# make demo   pictures from a fresh clone, with and without sharing, side by side
# make test   all tests: the quick ones, then the deep ones
# Both build and run in a virtual environment of their own; nothing outside this folder changes.
#
# make gpu    with the packages of PYTHON, nothing installed: build, tests, sanitizers and benchmarks on a GPU; DRY=1 lists the steps
#             STEPS="build tests" only these   DEVICE=cpu QUICK=1 what needs no GPU   RESULTS where the JSON goes
#
# TORCH   what to install as torch, any pip arguments: make demo TORCH="torch==2.13.0 --index-url URL"
# VENV    where the environment goes                   PYTHON  what makes it          OUT  where the pictures go

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
unexport PYTHONPATH

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(shell grep -m1 '^torch==' constraints.txt)
OUT ?= demo-out

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
# Small tensors: a worker per core with one thread each is faster than threads.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadscope
NATIVE := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: help demo test gpu
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# torch comes first and alone: the build needs it, and what follows must not bring another one.
$(VENV)/torch.txt: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH); this may download a lot"
	$(PIP) $(TORCH)
	$(PIP) -c constraints.txt setuptools wheel ninja pybind11
	@sed '/^torch==/d' constraints.txt > $(VENV)/constraints.txt
	@$(VENV)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' | tee -a $(VENV)/constraints.txt > $@

$(VENV)/sage.txt: $(VENV)/torch.txt $(NATIVE)
	@echo "Building sage-diffusion"
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e .
	@$(VENV)/bin/sage info | tee $@ > /dev/null

$(VENV)/test.txt: $(VENV)/sage.txt
	$(PIP) -c $(VENV)/constraints.txt --no-build-isolation -e '.[test]'
	@$(VENV)/bin/python -m pip --disable-pip-version-check freeze --exclude-editable > $@

demo: $(VENV)/sage.txt
	$(VENV)/bin/sage generate examples/prompts.txt --out $(OUT) --compare --overwrite

test: $(VENV)/test.txt
	$(PYTEST) -m "not deep"
	$(PYTEST) -m deep

gpu: export PYTHONPATH := $(PYTHONPATH)
gpu:
	$(PYTHON) benchmarks/gpu_worklist.py $(if $(STEPS),--steps $(STEPS)) $(if $(DEVICE),--device "$(DEVICE)") \
		$(if $(RESULTS),--results "$(RESULTS)") $(if $(filter 1,$(QUICK)),--quick) $(if $(filter 1,$(DRY)),--dry-run)
