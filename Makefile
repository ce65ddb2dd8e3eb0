# make train   the main job: set up what is missing, then the reference run (ARGS="--seed 2" passes arguments on)
# make test    lint, C++ tests, Python tests
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PACKAGES := g++ make cmake ninja-build libnuma1 libibverbs1
TEST_PACKAGES := doctest-dev chromium iproute2
FUZZ_PACKAGES := clang libclang-rt-14-dev
# Debian's own Python comes without these two
ifeq ($(PYTHON),/usr/bin/python3.11)
PACKAGES += python3.11-venv python3.11-dev
endif
CPP_SOURCES = $(shell find csrc bindings bench tests/cpp -name '*.cpp' -o -name '*.h')
ARGS ?=

FUZZ_SECONDS ?= 60

.PHONY: setup train test test-asan test-tsan test-python fuzz gpu-check bench lint format clean help
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: .venv/.packages .venv/.extension  ## Debian packages (as root), a .venv with pinned packages, the extension

train: setup  ## Train: a short SFT, then RL, of a small Qwen3 on arithmetic (ARGS="--help" lists the options)
	$(BIN)/kimisys train $(ARGS)

test: lint test-asan test-tsan test-python  ## Everything that CI checks

test-asan:  ## The C++ tests, without Python, under the address and undefined-behaviour sanitizers
test-tsan:  ## The C++ tests, without Python, under the thread sanitizer
test-asan: sanitizer = address,undefined
test-tsan: sanitizer = thread
test-asan test-tsan: .venv/.packages .venv/.test-packages
	@mkdir -p build
	@cmake -S . -B build/$@ -G Ninja -DKIMISYS_TESTS=ON -DKIMISYS_SANITIZE=$(sanitizer) \
	  >build/$@.log 2>&1 || { cat build/$@.log; exit 1; }
	@cmake --build build/$@
	ctest --test-dir build/$@ --output-on-failure

test-python: setup .venv/.test-packages  ## The Python tests (ARGS="-k digest" selects)
	$(BIN)/python -m pytest $(ARGS)

fuzz: .venv/.packages .venv/.fuzz-packages  ## Fuzz the compact forms with libFuzzer (FUZZ_SECONDS=60)
	@mkdir -p build
	@cmake -S . -B build/fuzz -G Ninja -DKIMISYS_FUZZ=ON -DCMAKE_CXX_COMPILER=clang++ \
	  >build/fuzz.log 2>&1 || { cat build/fuzz.log; exit 1; }
	@cmake --build build/fuzz --target forms_fuzz forms_corpus
	build/fuzz/forms_corpus --corpus build/fuzz/corpus
	build/fuzz/forms_fuzz -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 -timeout=10 \
	  -artifact_prefix=build/fuzz/ -print_final_stats=1 build/fuzz/corpus

# With the Python of the machine where it has what is needed, else with the .venv's.
GPU_PYTHON ?= $(or $(shell for p in python3 $(BIN)/python; do $$p -c 'import numpy, pybind11, torch' \
  2>/dev/null && echo $$p && break; done),python3)

gpu-check:  ## Build, test and measure on a machine with a GPU, offline and without setup (ARGS="--json FILE")
	$(GPU_PYTHON) tests/gpu/check.py $(ARGS)

bench: setup  ## The microbenchmarks (ARGS="reshard --json FILE")
	$(BIN)/python -m bench $(ARGS)

lint: setup  ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_SOURCES)

format: setup  ## Format Python and C++ in place
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:  ## Remove what was built (not the .venv)
	rm -rf build kimisys/_core*.so

# Debian packages: installed when root, named otherwise.
.venv/.packages: wanted = $(PACKAGES)
.venv/.test-packages: wanted = $(TEST_PACKAGES)
.venv/.fuzz-packages: wanted = $(FUZZ_PACKAGES)
.venv/.packages .venv/.test-packages .venv/.fuzz-packages: Makefile
	@mkdir -p .venv build
	@missing=""; for p in $(wanted); do dpkg -s $$p >/dev/null 2>&1 || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ]; then \
	    echo "installing$$missing"; \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	      apt-get install -y -qq --no-install-recommends $$missing; } >build/apt.log 2>&1 \
	      || { cat build/apt.log; exit 1; }; \
	  else echo "missing Debian packages; as root: apt-get install$$missing"; exit 1; fi; fi
	@touch $@

# torch first and alone (the CPU build); everything else is pinned, so nothing is resolved again.
.venv/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "the pinned packages need Python 3.11; set PYTHON=/path/to/python3.11"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	@echo "installing the pinned packages (about 2 minutes, 3.9 GB)"
	@$(BIN)/pip install -q --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps -r requirements.txt
	@touch $@

.venv/.extension: .venv/.packages .venv/.requirements setup.py pyproject.toml CMakeLists.txt $(shell find csrc bindings -type f)
	@echo "building the extension"
	@mkdir -p build
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e . >build/extension.log 2>&1 \
	  || { cat build/extension.log; exit 1; }
	@touch $@
