# The project's commands. `make demo` and `make test` need only Python 3.11+, a C++20 compiler and a network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
FRAMEWORKS ?= torch jax
# A process of tests per core: most of a test is compiling, on one.
PARALLEL ?= --numprocesses auto --dist worksteal
SOURCES := $(shell git ls-files cpp python CMakeLists.txt pyproject.toml)
CPP := $(shell git ls-files 'cpp/*.h' 'cpp/*.cpp' 'cpp/*.cu' 'tests/cpp/*.h' 'tests/cpp/*.cpp')
PY := python tests benchmarks scripts interop_examples
empty :=
space := $(empty) $(empty)
comma := ,

.PHONY: demo test test-python test-312 test-peers amd-quark test-cpp test-clang test-sanitized test-races test-aarch64 \
  fuzz test-simt test-simt-races test-simt-memory test-gpu-build lint tidy format generated docs bench exhaustive \
  test-long check-release harden clean

demo: $(VENV)/.installed
	$(BIN)/python -m quark_kernels demo

test: test-cpp test-python

# Files of tests/; all where none is named.
TESTS ?=

test-python: $(VENV)/.installed $(VENV)/.test-tools
	QUARK_TRANSFORMS_JSON=$(VENV)/transforms.json $(BIN)/python -m pytest $(PARALLEL) $(addprefix tests/,$(TESTS))

# Core and JAX on another Python, for which there is one wheel of the stable ABI.
PYTHON312 ?= $(call newest,3.12)
PYTHON313 ?= $(call newest,3.13)
newest = $(or $(lastword $(wildcard $(HOME)/.pyenv/versions/$1.*/bin/python$1)),$(shell command -v python$1))

test-312:
	@test -n "$(PYTHON312)" || { echo "no Python 3.12 on this machine: PYTHON312=..." >&2; exit 1; }
	$(MAKE) test-python PYTHON=$(PYTHON312) VENV=.venv-312 FRAMEWORKS=jax

# What torchao and compressed-tensors make of the same numbers, and our formats under the rules of qwix.
test-peers: $(VENV)/.installed $(VENV)/.test-tools
	$(PIP) --group peers
	$(BIN)/python -m pytest -q tests/test_torchao.py tests/test_compressed_tensors.py
	$(BIN)/python -m pytest -q tests/test_examples.py -k qwix

# AMD Quark's quantizer with these kernels behind its operators. It has many dependencies, and an environment of its own.
amd-quark: $(VENV)-amd/.installed
	$(VENV)-amd/bin/python -m pytest -q tests/test_amd_quark.py
	$(VENV)-amd/bin/python interop_examples/amd_quark_backend.py

# ---- environments ----------------------------------------------------------------------------------------------------

environment = $(PYTHON) -m venv $1 && $1/bin/python -m pip install --quiet --upgrade 'pip>=25.1'

$(VENV)/.frameworks: constraints.txt
	$(call environment,$(VENV))
	$(if $(filter torch,$(FRAMEWORKS)),$(PIP) torch)
	$(if $(filter jax,$(FRAMEWORKS)),$(PIP) jax jaxlib)
	touch $@

# Then what it needs: by its name, since a path would be built anew.
$(VENV)/.installed: $(VENV)/.frameworks $(SOURCES)
	$(PIP) --force-reinstall --no-deps .
	$(PIP) 'quark-kernels[$(subst $(space),$(comma),$(FRAMEWORKS))]'
	touch $@

$(VENV)/.test-tools: $(VENV)/.frameworks pyproject.toml
	$(PIP) --group test --group lint --group build
	$(if $(filter torch,$(FRAMEWORKS)),$(PIP) --group onnx)
	$(if $(filter jax,$(FRAMEWORKS)),$(PIP) flax)
	touch $@

# Environments with the packages of the usual one, in which the module is built otherwise.
DEBUG := -C cmake.build-type=RelWithDebInfo -C cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1' -C install.strip=false
OPTIONS_simt := -C cmake.define.QUARK_SIMT=ON
OPTIONS_asan := $(DEBUG) -C cmake.define.QUARK_SANITIZE=address,undefined
OPTIONS_tsan := $(DEBUG) -C cmake.define.QUARK_SANITIZE=thread
PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

$(VENV)/.%: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m venv --without-pip $(VENV)-$*
	$(BIN)/python $(PACKAGES) > "$$($(VENV)-$*/bin/python $(PACKAGES))/packages.pth"
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps --upgrade $(OPTIONS_$*) \
	  -C cmake.define.QUARK_WERROR=ON -C build-dir=build/module-$* . --target "$$($(VENV)-$*/bin/python $(PACKAGES))"
	touch $@

# torch first, and pinned in every call: the others would fetch the newest. AMD Quark compiles as it is imported.
TORCH := $(shell grep ^torch== constraints.txt)

$(VENV)-amd/.installed: $(SOURCES) constraints.txt
	$(call environment,$(VENV)-amd)
	$(VENV)-amd/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-amd/bin/python -m pip install --quiet $(TORCH) --group test --group amd-quark
	$(VENV)-amd/bin/python -m pip install --quiet --force-reinstall --no-deps .
	touch $@

# What the tests of transforms find; `make test` writes it too.
$(VENV)/transforms.json: $(VENV)/.installed $(VENV)/.test-tools $(wildcard tests/test_transforms_*.py tests/transforms.py)
	QUARK_TRANSFORMS_JSON=$@ $(BIN)/python -m pytest -q tests/test_transforms_torch.py tests/test_transforms_jax.py \
	  tests/test_sharding_jax.py tests/test_distributed_torch.py

# ---- C++ -------------------------------------------------------------------------------------------------------------

# A preset of CMakePresets.json.
PRESET ?= cpp

# What its compiler comes from, on Debian: sanitizers and the fuzzer have packages of their own.
PACKAGES_clang := clang-19
PACKAGES_fuzz := clang-19 libclang-rt-19-dev llvm-19
PACKAGES_aarch64 := g++-aarch64-linux-gnu qemu-user

test-cpp: $(VENV)/.test-tools
	$(if $(PACKAGES_$(PRESET)),scripts/packages.sh $(PACKAGES_$(PRESET)))
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset $(PRESET)
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset $(PRESET)
	PATH="$(abspath $(BIN)):$$PATH" ctest --preset $(PRESET)

# The extension by clang, in the environment as it is (without build isolation), and a short test of it.
test-clang: $(VENV)/.installed $(VENV)/.test-tools
	$(MAKE) test-cpp PRESET=clang
	PATH="$(abspath $(BIN)):$$PATH" CXX=clang++-19 $(PIP) --no-build-isolation --no-deps --force-reinstall \
	  -C cmake.define.QUARK_WERROR=ON .
	touch -d @0 $(VENV)/.installed
	$(BIN)/python -m pytest -q tests/test_formats.py tests/test_errors.py

# The C++ tests under sanitizers, then the extension: Python itself knows nothing of them.
SANITIZED = $(addprefix tests/,$(SIMT_TESTS) test_errors.py) -k core

test-sanitized: $(VENV)/.asan
	$(MAKE) test-cpp PRESET=asan
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
	  $(VENV)-asan/bin/python -m pytest -q -p no:cacheprovider $(SANITIZED)

# Data races, in the C++ tests that have threads: libgomp's own barriers are unknown to the sanitizer, so what is seen
# follows from the core's memory orders.
THREADED := parallel determinism

test-races: $(VENV)/.tsan
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset tsan
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset tsan --target $(addprefix test_,$(THREADED))
	for test in $(THREADED); do QUARK_TEST_CALLS=100 build/tsan/tests/cpp/test_$$test || exit 1; done
	LD_PRELOAD="$$(gcc -print-file-name=libtsan.so)" TSAN_OPTIONS=halt_on_error=1:suppressions=tests/tsan.supp \
	  $(VENV)-tsan/bin/python -m pytest -q -s -p no:cacheprovider tests/test_forward.py tests/test_concurrency.py -k core

# Seconds, or executions: FUZZ=-runs=1000000. What was found lies in build/fuzz/found; fuzz_replay runs it.
FUZZ ?= -max_total_time=60
JOBS ?= $(shell nproc)

fuzz: $(VENV)/.test-tools
	scripts/packages.sh $(PACKAGES_fuzz)
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset fuzz
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset fuzz --target fuzz fuzz_replay
	mkdir -p build/fuzz/found build/fuzz/new
	cd build/fuzz/found && ../tests/cpp/fuzz -jobs=$(JOBS) -workers=$(JOBS) -max_len=256 -use_counters=0 -entropic=0 \
	  -timeout=60 -rss_limit_mb=4096 $(FUZZ) ../new ../../../tests/cpp/fuzz/corpus

# Another processor, emulated: the tests' own calls give the bytes that they give here.
test-aarch64: $(VENV)/.installed $(VENV)/.test-tools
	scripts/packages.sh $(PACKAGES_aarch64)
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset cpp
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset cpp --target replay
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset aarch64
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset aarch64 --target replay
	PYTHON=$(BIN)/python scripts/replay_calls.sh build/cpp/tests/cpp/replay \
	  "qemu-aarch64 -L /usr/aarch64-linux-gnu build/aarch64/tests/cpp/replay"

# ---- GPU kernels, without a GPU --------------------------------------------------------------------------------------

# On the machine of tests/cpp/simt: the C++ tests, then those of Python's that call every operator with every format.
SIMT_TESTS ?= test_blocks.py test_learned.py test_choose.py test_stochastic.py test_forward.py test_gradients.py
SIMT_ONLY ?= -k core

test-simt: $(VENV)/.simt
	$(MAKE) test-cpp PRESET=simt
	QUARK_CPU_LEVEL=simt $(VENV)-simt/bin/python -m pytest -q $(PARALLEL) $(addprefix tests/,$(SIMT_TESTS)) $(SIMT_ONLY)

# Every GPU thread is a thread to the sanitizer; calls that the CPU computes with OpenMP's are left out.
SIMT_CALLS ?= 40
SIMT_RACES ?= quantize backward extremes pack

test-simt-races: $(VENV)/.test-tools
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset simt-tsan
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset simt-tsan --target test_simt test_kernels
	build/simt-tsan/tests/cpp/test_simt
	for test in $(SIMT_RACES); do \
	  QUARK_CPU_LEVEL=simt QUARK_TEST_LEVEL=simt QUARK_TEST_CALLS=$(SIMT_CALLS) \
	    build/simt-tsan/tests/cpp/test_kernels $$test || exit 1; \
	done

# Memory: the same few tests under the sanitizers of addresses and undefined behaviour.
test-simt-memory: $(VENV)/.test-tools
	PATH="$(abspath $(BIN)):$$PATH" cmake --preset simt-asan
	PATH="$(abspath $(BIN)):$$PATH" cmake --build --preset simt-asan --target test_kernels
	for test in $(SIMT_RACES) vectors; do \
	  QUARK_TEST_LEVEL=simt QUARK_TEST_CALLS=$(SIMT_CALLS) UBSAN_OPTIONS=halt_on_error=1 \
	    build/simt-asan/tests/cpp/test_kernels $$test || exit 1; \
	done

# The extension for CUDA and HIP with the compilers alone: it loads without a driver and says that there is no device.
# And what the compilers made of the arithmetic. HIP_DEVICES: for those alone, as in "gfx942;gfx1100".
HIP_FOLDER := $(abspath build)/hip
LINTED ?= --only 80 90 gfx942 gfx1100
HIP_DEVICES ?=
GPUS ?= $(if $(shell command -v nvcc),CUDA) HIP

test-gpu-build: $(VENV)/.installed $(VENV)/.test-tools
	mkdir -p build
	scripts/setup_hip.sh $(HIP_FOLDER) > build/hip-arguments
	rm -rf build/gpu-package
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps --target build/gpu-package . \
	  -C build-dir=build/gpu $(foreach platform,$(GPUS),-C cmake.define.QUARK_$(platform)=ON) \
	  $(if $(HIP_DEVICES),-C cmake.define.QUARK_HIP_ARCHITECTURES="$(HIP_DEVICES)") \
	  $$(sed -n 's/^-D\(.*\)/-C cmake.define.\1/p' build/hip-arguments)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/device_code.py build/gpu build/gpu-code $(LINTED)
	PYTHONPATH=build/gpu-package $(BIN)/python -P tests/no_device.py $(GPUS)

# ---- style -----------------------------------------------------------------------------------------------------------

lint: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# clang-tidy over the core and the bindings.
tidy: $(VENV)/.test-tools
	$(BIN)/python scripts/tidy.py

format: $(VENV)/.test-tools
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)

# What is written from the compiled core (the stub of the module, the table of formats) and from what tests found.
generated: $(VENV)/.installed $(VENV)/.test-tools $(VENV)/transforms.json
	$(BIN)/python -m nanobind.stubgen -q -m quark_kernels._core -o python/quark_kernels/_core.pyi
	$(BIN)/ruff format --quiet python/quark_kernels/_core.pyi
	$(BIN)/python scripts/format_table.py
	$(BIN)/python scripts/api.py
	$(BIN)/python scripts/transform_table.py $(VENV)/transforms.json

# The site, from docs/, README.md and the docstrings, which are read and not imported; a warning is an error.
$(VENV)-docs/.tools: constraints.txt pyproject.toml
	$(call environment,$(VENV)-docs)
	$(VENV)-docs/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	touch $@

docs: $(VENV)-docs/.tools
	PATH="$(abspath $(VENV)-docs/bin):$$PATH" NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

# ---- long forms ------------------------------------------------------------------------------------------------------

# Options of benchmarks/bench.py, as in: make bench BENCH="--peers --docs"
BENCH ?=

bench: $(VENV)/.installed
	$(PIP) matplotlib
	$(BIN)/python benchmarks/bench.py $(BENCH)

# Every float32 through every format of up to 8 bits. A part: make exhaustive EXHAUSTIVE="--formats fp8_e4m3"
EXHAUSTIVE ?=

exhaustive: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python tests/exhaustive.py $(EXHAUSTIVE)

# Tests that need minutes, or gigabytes; so many times the examples of hypothesis.
FUZZ_FACTOR ?= 20

test-long: $(VENV)/.installed $(VENV)/.test-tools
	QUARK_TEST_LONG=1 $(BIN)/python -m pytest -q tests/test_memory.py
	QUARK_TEST_LONG=1 $(BIN)/python -m pytest -q tests/test_concurrency.py tests/test_failures.py
	QUARK_FUZZ_FACTOR=$(FUZZ_FACTOR) $(BIN)/python -m pytest -q $(PARALLEL) tests/test_readers_fuzz.py tests/test_states.py

# What a release would consist of: sdist, wheels, licences.
# POLICY is the newest platform tag that the wheels may have: that of Debian 12's libstdc++.
POLICY ?= manylinux_2_35_x86_64

check-release:
	PYTHON=$(PYTHON) ABI3=$(PYTHON312) NEWER=$(PYTHON313) POLICY=$(POLICY) scripts/check_release.sh

# What is promised in docs/reliability.md: every float32, other machines, sanitizers, 20 million calls of a fuzzer, long
# tests, one wheel under every supported jaxlib, a release. And the GPU's kernels: all Python tests of the operators on the
# simulated one, under sanitizers, with planted bugs, and the code for every device.
RUNS := $(shell expr 20000000 / $(JOBS) + 1)

harden: $(VENV)/.installed
	$(MAKE) exhaustive
	$(MAKE) test-sanitized
	$(MAKE) test-races
	$(MAKE) fuzz FUZZ=-runs=$(RUNS)
	$(MAKE) test-long
	$(MAKE) test-cpp PRESET=aarch64
	$(MAKE) test-aarch64
	$(MAKE) check-release
	$(MAKE) amd-quark
	$(MAKE) test-312
	scripts/jaxlib_matrix.sh
	PYTHON=$(PYTHON312) scripts/jaxlib_matrix.sh newest
	$(MAKE) test-simt SIMT_TESTS="$(SIMT_TESTS) test_conformance.py test_documented.py test_parity.py test_errors.py" SIMT_ONLY=
	for warp in 32 64; do \
	  QUARK_TEST_LEVEL=simt QUARK_SIMT_WARP=$$warp QUARK_SIMT_ORDER=backward build/simt/tests/cpp/test_kernels || exit 1; \
	done
	$(MAKE) test-cpp PRESET=simt-asan
	$(MAKE) test-simt-races SIMT_CALLS=1000 SIMT_RACES="$(SIMT_RACES) vectors"
	$(BIN)/python scripts/one_nan.py
	$(BIN)/python scripts/mutate_gpu.py
	$(MAKE) test-gpu-build LINTED=

clean:
	rm -rf build $(VENV) .venv-*
