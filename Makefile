# Everything sets itself up: the first target to run makes the environment (about 4 minutes, most of it torch).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := build/demo.attn
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: setup demo test test-all accuracy coverage bench lint format clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: setup
	$(BIN)/attn-deploy export --out $(DEMO) --data attn_deploy/demo/held_out.npz --force
	$(BIN)/attn-deploy run $(DEMO) attn_deploy/demo/samples/7_0.png --top 3

test: setup
	$(PYTEST) -n 2 -m "not slow"

test-all: setup
	$(PYTEST) -n 2

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
