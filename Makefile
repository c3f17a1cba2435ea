# Everything from a fresh clone: `make test`, `make demo`. `make help` lists the rest.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# What is installed when no PyTorch is there to be reused. Without an NVIDIA GPU a pinned version is asked for, which has a
# processor build on the indexes that carry one; TORCH_INDEX_URL names such an index where pip's own settings do not.
TORCH_VERSION ?= 2.13.0
TORCHVISION_VERSION ?= 0.28.0
RUFF_VERSION ?= 0.17.6
TRITON_VERSION ?= 3.6.0
TORCH_INDEX_URL ?=
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# What `make` builds is for this machine: for its GPU, or without one for a single architecture, to be compiled and never run.
# `pip install .` builds for all of them.
export TORCH_CUDA_ARCH_LIST ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1),9.0)
TORCH_SPEC ?= $(if $(HAS_GPU),torch,torch==$(TORCH_VERSION))
RESULTS ?= benchmarks/results

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
NATIVE_SOURCES := setup.py pyproject.toml $(shell find csrc build_backend -type f -not -path '*/__pycache__/*' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help setup test lint bench bench-gpu sanitize budget demo clean distclean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.built  ## create the environment and build the package into it

$(VENV)/.environment:
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	  echo "reusing the installed PyTorch"; $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV); fi
	@touch $@

$(VENV)/.torch: $(VENV)/.environment
	@$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing $(TORCH_SPEC)"; \
	  $(PIP) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) '$(TORCH_SPEC)'; }
	@touch $@

# torchvision and timm come without their dependencies: they ask for a PyTorch of their own.
$(VENV)/.packages: $(VENV)/.torch
	@echo "installing what tests and benchmarks need"
	@$(PIP) 'numpy<2.4' setuptools wheel ninja pybind11 pillow rich safetensors scikit-image scikit-learn matplotlib \
	  pytest pytest-xdist expecttest onnx onnxscript pyyaml huggingface_hub 'ruff==$(RUFF_VERSION)' mypy
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("torchvision")' 2>/dev/null || \
	  $(PIP) --no-deps 'torchvision==$(TORCHVISION_VERSION)'
	@$(PIP) --no-deps timm
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) 'triton==$(TRITON_VERSION)' || \
	  echo "no Triton here: the tests of its kernels are left out"
	@touch $@

$(VENV)/.built: $(VENV)/.packages $(NATIVE_SOURCES)
	@echo "building resnet_fused"
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

test: setup  ## the default test suite
	$(BIN)/python -m pytest -q -n auto $(PYTEST_ARGS)

budget: setup  ## compile every shipped Triton configuration for three GPU generations; writes tests/triton/budget.csv
	$(BIN)/python tests/triton/resources.py

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy resnet_fused

bench: setup  ## ResNet-50 in inference and training, and the processor kernels; rows under benchmarks/results/
	@mkdir -p $(RESULTS)
	$(BIN)/resnet-fused bench --model resnet50 --batch 1 16 --dtype fp32 bf16 --results-file $(RESULTS)/networks_cpu.csv
	$(BIN)/resnet-fused bench --model resnet50 --batch 16 --dtype fp32 bf16 --mode train --providers stock fused \
	  --repeats 5 --results-file $(RESULTS)/networks_cpu.csv
	$(BIN)/python benchmarks/bench_bn.py --results-file $(RESULTS)/kernels_cpu.csv

bench-gpu: setup  ## on a GPU: checks, ceilings, kernels, blocks, networks; ten minutes at a time (GPU_ARGS=--help)
	@mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/gpu.py --results $(RESULTS) $(GPU_ARGS); status=$$?; \
	  $(BIN)/python benchmarks/report.py --results $(RESULTS) && exit $$status

sanitize: setup  ## on a GPU: the CUDA extension's operators under compute-sanitizer
	@command -v compute-sanitizer >/dev/null || { echo "make sanitize: compute-sanitizer is not on the PATH"; exit 1; }
	for tool in memcheck racecheck initcheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(BIN)/python benchmarks/check_cuda.py --small --dtype fp32 bf16 || exit 1; \
	done

demo: setup  ## ResNet-50 on photographs, then a ResNet-18 trained with stock and with fused blocks; ten minutes at most
	$(BIN)/resnet-fused bench --model resnet50 --batch 1 16 --dtype fp32 --providers stock fused compile --repeats 5
	$(BIN)/resnet-fused bench --model resnet50 --batch 8 --dtype fp32 --mode train --providers stock fused --repeats 3
	$(BIN)/python examples/demo_training.py --output demo-output

clean:  ## remove what was built, keep the environment
	rm -rf build dist demo-output *.egg-info .pytest_cache .ruff_cache .mypy_cache resnet_fused/*.so $(VENV)/.built
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment too
	rm -rf $(VENV)
