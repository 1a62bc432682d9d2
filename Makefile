# Every target makes .venv when it is missing and installs what it needs into it, once per change
# of pyproject.toml or constraints.txt.
#   make demo ARGS="--rate 1gbit"      make test ARGS="-k policy"      make test PYTHON=python3.13
# The gpu targets install nothing: they run from the checkout with the Python that has torch for CUDA.
#   make gpu GPU_PYTHON=python3      make gpu-bench BENCHES="kernels launches"

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
ARGS   ?=
GPU_PYTHON ?= python3
CHECKS ?=
BENCHES ?=

.PHONY: demo demo-pipeline demo-method test test-bench test-recipes test-faults conformance lint bench loss faults compile-matrix test-cuda gpu gpu-check gpu-bench clean

demo: $(VENV)/.installed-plot      ## four emulated hosts train a small GPT: plain DDP, bf16, int8+ef, int4+ef
	$(BIN)/commlib demo $(ARGS)

demo-pipeline: $(VENV)/.installed-plot   ## the same in 4 pipeline stages: activations raw, int8, int4, +lep, +delta, +reuse
	$(BIN)/commlib demo --pipeline $(ARGS)

demo-method: $(VENV)/.installed-plot     ## methods that exchange once in many steps: EASGD, DiLoCo, streaming
	$(BIN)/commlib demo --method easgd,diloco,streaming $(ARGS)

loss: $(VENV)/.installed-plot      ## what each scheme costs in held-out loss, paired seeds, no network limit
	$(BIN)/commlib demo --loss --seeds 3 $(ARGS)

# Two at a time: the tests wait for peers and timeouts half of their time.
test: $(VENV)/.warm
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu and not bench and not cuda_host" --ignore=tests/recipes $(ARGS)

test-bench: $(VENV)/.warm          ## every bench and demo, shortened: it runs, and its bars can be read
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "bench and not gpu" $(ARGS)

test-recipes: $(VENV)/.installed-recipes   ## every script of tests/recipes, compressed and in fp32
	COMMLIB_REQUIRE=recipes $(BIN)/python -m pytest tests/recipes $(ARGS)

test-faults: $(VENV)/.installed-dev  ## links cut, ranks stopped and killed, disks filled: an error, then the same losses
	$(BIN)/python -m pytest tests/faults $(ARGS)

conformance: $(VENV)/.installed-conformance   ## PyTorch's own distributed suite on gloo and on commlib, compared
	PYTHONPATH=.:kernels $(BIN)/python -m tests.conformance $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

compile-matrix: $(VENV)/.installed-cuda-check   ## every CUDA kernel for sm_75 to sm_120, without a GPU: no spill, no fma
	$(BIN)/python -m bench.compile_matrix $(ARGS)

# Compilers and the simulator take minutes where CI gives them what the tests leave of the processors.
test-cuda: $(VENV)/.installed-cuda-check   ## CUDA kernels without a GPU: how they compile, on the CPU, in the simulator
	$(BIN)/python -m pytest -q --timeout 900 -m cuda_host tests/kernels
	$(BIN)/python -m pytest -q --timeout 900 tests/kernels/test_cupy_cuda.py tests/kernels/test_numba_cuda_build.py
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest -q --timeout 900 tests/simulator $(ARGS)

gpu: gpu-check gpu-bench           ## on a machine with a GPU: check, then measure, into bench/results/gpu/

gpu-check:
	PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m bench.gpu.check $(CHECKS)

gpu-bench:
	PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(GPU_PYTHON) -m bench.gpu.bench $(BENCHES)

bench: $(VENV)/.installed-bench    ## kernels, codecs and hook overhead, saved as JSON
	mkdir -p bench/results/local
	$(BIN)/python -m pytest bench --benchmark-json=bench/results/local/bench.json $(ARGS)

faults: $(VENV)/.installed-dev     ## kill peers at random moments, 200 times: nobody hangs
	$(BIN)/python -m bench.faults --trials 200 $(ARGS)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

# With an empty cache every rank of a test would compile the CPU kernels for itself.
$(VENV)/.warm: $(VENV)/.installed-dev $(shell find kernels -name '*.py')
	$(BIN)/commlib warmup
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:                             ## what tools and builds leave behind; .venv stays
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks bench/results/local
	rm -rf *.egg-info kernels/*.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
