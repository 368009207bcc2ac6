# make demo   serve and load for ten seconds, and show both results
# make test   lint, types and all tests
# make bench  this server beside its rivals, in alternating rounds; writes docs/benchmarks.md
# make chaos  the long forms of the tests: kills, stores that fail, hostile peers, fuzz, memory
# make clean  forget the virtual environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DURATION ?= 10s
CHAOS ?= killing or durability or test_hostile or test_fuzz or test_proof

.PHONY: demo test lint types bench chaos clean

demo: $(VENV)/run.stamp
	@BIN=$(BIN) DURATION=$(DURATION) sh ./demo.sh

test: lint types
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(VENV)/dev.stamp
	$(BIN)/mypy

bench: $(VENV)/bench.stamp
	$(BIN)/python benchmarks/compare.py

chaos: $(VENV)/dev.stamp
	LONG=1 $(BIN)/python -m pytest -s -k "$(CHAOS)"

clean:
	rm -rf $(VENV)

# A stamp is newer than the requirements it was installed from: a second run installs nothing.
$(VENV)/run.stamp: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/dev.stamp: requirements-dev.txt $(VENV)/run.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/bench.stamp: benchmarks/requirements.txt $(VENV)/run.stamp
	$(BIN)/python -m pip install -q --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@
