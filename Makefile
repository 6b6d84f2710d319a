# The project's commands. `make demo` and `make test` need only Python 3.11+, a C++20 compiler and a network.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
FRAMEWORKS ?= torch jax
SOURCES := $(shell git ls-files cpp python CMakeLists.txt pyproject.toml)
CPP := $(shell git ls-files 'cpp/*.h' 'cpp/*.cpp' 'cpp/*.cu' 'tests/cpp/*.h' 'tests/cpp/*.cpp')
PY := python tests benchmarks scripts interop_examples
empty :=
space := $(empty) $(empty)
comma := ,

.PHONY: demo test test-python test-cpp lint format stubs bench harden clean

demo: $(VENV)/.installed
	$(BIN)/python -m quark_kernels demo

test: test-cpp test-python

test-python: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m pytest

# ---- environments ----------------------------------------------------------------------------------------------------

$(VENV)/.frameworks: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(if $(filter torch,$(FRAMEWORKS)),$(PIP) torch)
	$(if $(filter jax,$(FRAMEWORKS)),$(PIP) jax jaxlib)
	touch $@

$(VENV)/.installed: $(VENV)/.frameworks $(SOURCES)
	$(PIP) --force-reinstall --no-deps .
	$(PIP) '.[$(subst $(space),$(comma),$(FRAMEWORKS))]'
	touch $@

$(VENV)/.test-tools: $(VENV)/.frameworks pyproject.toml
	$(PIP) --group test --group lint
	touch $@

# ---- C++ -------------------------------------------------------------------------------------------------------------

CXX_BUILD ?= build/cpp
CMAKE_FLAGS ?=

test-cpp: $(VENV)/.test-tools
	$(BIN)/cmake -S . -B $(CXX_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DQUARK_PYTHON=OFF -DQUARK_TESTS=ON -DQUARK_WERROR=ON $(CMAKE_FLAGS)
	$(BIN)/cmake --build $(CXX_BUILD)
	$(BIN)/ctest --test-dir $(CXX_BUILD) --output-on-failure

# ---- style -----------------------------------------------------------------------------------------------------------

lint: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/ruff check $(PY)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/mypy

format: $(VENV)/.test-tools
	$(BIN)/clang-format -i $(CPP)
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)

stubs: $(VENV)/.installed $(VENV)/.test-tools
	$(BIN)/python -m nanobind.stubgen -q -m quark_kernels._core -o python/quark_kernels/_core.pyi
	$(BIN)/ruff format --quiet python/quark_kernels/_core.pyi

# ---- long forms ------------------------------------------------------------------------------------------------------

bench: $(VENV)/.installed
	$(PIP) matplotlib
	$(BIN)/python benchmarks/bench.py

# One wheel under every supported jaxlib, and the C++ tests under sanitizers.
harden: $(VENV)/.installed
	$(MAKE) test-cpp CXX_BUILD=build/asan CMAKE_FLAGS='-DQUARK_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo'
	scripts/jaxlib_matrix.sh

clean:
	rm -rf build $(VENV) .venv-*
