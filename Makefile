# `make demo`, `make test` (without the tests marked slow) and `make test-all`. Each makes .venv, installs, builds the extension, and reuses all of it next time.
PYTHON ?= python3
VENV ?= .venv
# The build and the runs must see one torch, so it is installed first and the package is built without isolation.
# On a machine without a GPU the CPU build is enough: make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
DEMO ?=
# Processes that share the tests, file by file, where pytest-xdist is installed; 0 for none but pytest's own.
JOBS ?= 2

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml MANIFEST.in $(shell find csrc -type f)

.PHONY: demo test test-all lint package setup clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/tfb demo $(DEMO)

test: SELECTED := -m "not slow"

test test-all: $(VENV)/.built
	$(BIN)/python -m pytest $(SELECTED) $$($(BIN)/python -c 'import xdist; print("-n $(JOBS) --dist loadfile --no-loadscope-reorder")' 2>/dev/null)

setup: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) "setuptools>=77" wheel pybind11 ninja numpy
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,data,test]"
	touch $@

# What CI checks besides the tests: style, types, and that nvcc (where it is there) compiles every kernel without spills.
lint: $(VENV)/.built
	$(BIN)/python -m pip install --quiet --no-build-isolation ruff==0.17.6 mypy==2.4.1 clang-format==19.1.7
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	PATH="$(abspath $(BIN)):$$PATH" bash tests/compile_cuda.sh

# What CI checks of the distribution: it builds from its own files, twine accepts it, and it runs where it is installed.
package: $(VENV)/.built
	$(BIN)/python -m pip install --quiet build==1.6.1 twine==7.0.0
	PATH="$(abspath $(BIN)):$$PATH" bash tests/check_package.sh $(BIN)/python

clean:
	rm -rf $(VENV) build report tfb_ext/*.so *.egg-info
