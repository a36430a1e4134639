# Everything sets itself up: the first target to run makes the environment (about 4 minutes, most of it torch).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo.attn
# The GPU build of ONNX Runtime lies beside the environment: in it, it would overwrite the CPU build. Tests run it upon
# stand-ins for CUDA, to see which kernels it has and which node it puts where (tests/runtimes/cuda_stand_ins).
ORT_GPU := $(abspath $(VENV))/onnxruntime-gpu
ORT_GPU_VERSION := 1.31.1
PYTEST := OMP_NUM_THREADS=1 ATTN_DEPLOY_ORT_GPU=$(ORT_GPU) $(BIN)/python -m pytest

.PHONY: setup demo test test-all test-gpu accuracy coverage bench bench-gpu lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test,bench]'
	test -f $(ORT_GPU)/.$(ORT_GPU_VERSION) || ( $(BIN)/python -m pip install --quiet --no-deps --upgrade \
	  --target $(ORT_GPU) onnxruntime-gpu==$(ORT_GPU_VERSION) cuda-core nvidia-ml-py && \
	  touch $(ORT_GPU)/.$(ORT_GPU_VERSION) ) || echo "no onnxruntime-gpu for this platform: tests of it will skip"
	touch $@

demo: setup
	$(BIN)/attn-deploy export --out $(DEMO) --data attn_deploy/demo/held_out.npz --force
	$(BIN)/attn-deploy run $(DEMO) attn_deploy/demo/samples/7_0.png --top 3

test: setup
	$(PYTEST) -n 2 -m "not slow"

test-all: setup
	$(PYTEST) -n 2

# On a GPU the GPU build of ONNX Runtime takes the CPU build's place, which it contains.
ON_GPU := PYTHONPATH=$(ORT_GPU) ATTN_DEPLOY_ORT_GPU=$(ORT_GPU) $(BIN)/python

# Each of these skips with its reason where there is no NVIDIA GPU.
test-gpu: setup
	$(ON_GPU) -m pytest -m gpu

bench-gpu: setup
	$(ON_GPU) bench/gpu.py
	$(ON_GPU) bench/cuda_kernels.py

accuracy: setup
	$(PYTEST) -m real_data --no-skip

# Goes on where it was stopped; writes COVERAGE.md and bench/results/coverage.json.
coverage: setup
	PYTHONPATH=tests/coverage PYTHONWARNINGS=ignore $(BIN)/python -m attention_coverage

bench: setup
	$(BIN)/python bench/run.py

# mypy reads the package as it is installed: export/ and runtimes/ below attn_deploy/.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/lint/attn_deploy
	ln -sfn $(CURDIR)/attn_deploy/* build/lint/attn_deploy/
	ln -sfn $(CURDIR)/export build/lint/attn_deploy/export
	ln -sfn $(CURDIR)/runtimes build/lint/attn_deploy/runtimes
	MYPYPATH=build/lint $(BIN)/mypy --package attn_deploy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build .venv
