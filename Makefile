# Each target sets up .venv by itself. Nothing but Python >= 3.11 and make is needed.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONUNBUFFERED = 1

.PHONY: demo test check bench faults test-cluster format clean

# Made again only when the pins or the project file change.
.venv: constraints.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --constraints constraints.txt --group dev --editable .
	@touch .venv

demo: .venv
	$(BIN)/heal demo --report out/demo.json

test: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -n 2 --durations=10
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ray --durations=10

check: .venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: .venv
	$(BIN)/python -m benchmarks.serving

faults: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/faults
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ray/test_loop.py tests/ray/test_search.py

test-cluster: .venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster

clean:
	rm -rf .venv out
