# Everything runs in .venv, made at first use. PYTHON chooses the interpreter it is made with (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
export HF_HUB_OFFLINE ?= 1
export FLWR_TELEMETRY_ENABLED = 0

.PHONY: demo test test-slow cover check bench fmt proto clean

demo: .venv/installed  ## fine-tune across four sites with differential privacy, epsilon 8
	$(BIN)/moonflower simulate

test: .venv/developed  ## every test but the slow ones
	$(PYTEST) --numprocesses 2 --dist worksteal -m "not slow"

test-slow: .venv/developed  ## the slow tests: many kills, Flower's own engine
	$(PYTEST) -m slow

cover: .venv/developed  ## the tests again, with branch coverage
	$(PYTEST) --numprocesses 2 --dist worksteal -m "not slow" --cov --cov-report=term:skip-covered

check: .venv/developed  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/developed  ## the benchmarks, each a table
	$(BIN)/python benchmarks/history.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/accounting.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/private_step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/sensitivity_matrix.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/round_overhead.py

soak: .venv/developed  ## 200 rounds over real processes with random kills: half an hour and more
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

fmt: .venv/developed  ## put the code in order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: .venv/developed  ## the code of the control service's messages, after a change of coordinator.proto
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. --grpc_python_out=. server/control/coordinator.proto

clean:  ## forget the environment and the caches
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/developed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ .venv/installed
