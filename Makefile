# make demo, make test: each sets up all it needs in .venv, from the package index, with Python 3.11 or newer.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/installed

.PHONY: demo test bench compare chaos cancel fuzz matrix clean

demo: $(STAMP)
	@$(BIN)/notifyq demo

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

bench: $(STAMP)
	@$(BIN)/python -m notifyq.bench

# Hours in all; stopped, it goes on where it was. Fewer cells: make compare ONLY='pgqueuer drain --repeats 1'
compare: $(STAMP)
	@$(BIN)/python -m benchmarks.compare $(or $(ONLY),--readme)

# Breaks everything around notifyq while it works, and counts every job: docs/faults.md. make chaos MINUTES=30 SEED=1 FAULTS='kill stop'
chaos: $(STAMP)
	@$(BIN)/python -m tests.faults.chaos --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON)) $(FAULTS)

# Ends a runtime, its parts and a client wherever they wait, each place once: docs/faults.md. A quarter of an hour and more.
cancel: $(STAMP)
	@NOTIFYQ_ALL_STEPS=1 $(BIN)/pytest tests/faults/test_cancelled.py tests/faults/test_cancelled_everywhere.py

# Anything at all for every public function and every SQL function, other values each time. More: make fuzz EXAMPLES=1000
fuzz: $(STAMP)
	@NOTIFYQ_FUZZ=$(or $(EXAMPLES),100) $(BIN)/pytest tests/flow/test_fuzz.py tests/sql/test_fuzz.py

# Half an hour and more in all. Fewer cells: make matrix VERSIONS='13 16', DEPENDENCIES=lowest, PYTHONS=python3.13, ONLY=tests/sql
matrix: $(STAMP)
	@$(BIN)/python tests/matrix.py $(VERSIONS:%=--server %) $(DEPENDENCIES:%=--dependencies %) $(PYTHONS:%=--python %) $(ONLY)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"notifyq needs Python 3.11 or newer, not {v[0]}.{v[1]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) benchmarks/compare/.peers .matrix dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
