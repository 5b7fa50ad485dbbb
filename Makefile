# make demo   the whole of pre-training distillation on this machine, in about ten minutes
# make test   the test suite;   make lint   style and types;   make build   only the installation
# Each sets up what it needs in .venv; a second call installs and compiles nothing.

VENV      := .venv
BIN       := $(VENV)/bin
SEED      ?= 1
INSTALLED := $(VENV)/.installed
BUILT     := $(VENV)/.built
SOURCES   := $(shell find csrc -type f 2>/dev/null)
export PYTHON MEGATRON_PD_BUILD_CUDA

.PHONY: demo test lint build clean
.DELETE_ON_ERROR:

demo: $(BUILT)
	$(BIN)/python examples/demo --seed $(SEED)

test: $(BUILT)
	$(BIN)/python -m pytest

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(BUILT)

# torch has to be there before the project: its headers are what the extension is built against.
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || { python=$$(tools/find_python.sh) && "$$python" -m venv $(VENV); }
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/build-requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/build-requirements.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation -e '.[dev]'
	touch $@

$(BUILT): $(INSTALLED) setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf build $(VENV) *.egg-info
	find megatron_pd -name '*.so' -delete
