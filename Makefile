# make demo      serve and load for ten seconds, and show both results
# make test      lint, types and all tests
# make quick     the same without the tests that have a long form: two thirds of the time; TESTS names
#                files or folders where it shall be some of them alone
# make bench     this server beside its rivals, in alternating rounds; writes docs/benchmarks.md
# make chaos     the long forms of the tests: kills, stores that fail, hostile peers, fuzz, memory
# make sanitize  the tests named by SANITIZE on a compiled engine that watches itself; in chaos too
# make clean     forget the virtual environments
#
# Whatever installs says which engine there is: the compiled one, or why it could not be built.
# PYTHON=python3.13, or a path, takes another Python than python3, in an environment of its own.

PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(VERSION))
$(if $(filter-out .venv,$(VENV)),$(if $(VERSION),$(info Python $(VERSION) in $(VENV))))
BIN := $(VENV)/bin
RUN := $(VENV)/run-$(VERSION).stamp
DEV := $(VENV)/dev-$(VERSION).stamp
BENCH := $(VENV)/bench-$(VERSION).stamp
TURN := $(wildcard counter/turn/*.[ch]) $(addprefix counter/turn/,pyproject.toml setup.py source_hash.py)
SANITIZED := $(abspath $(VENV)/sanitized-$(VERSION))
SANITIZE ?= tests/turn tests/load/test_load_engines.py
DURATION ?= 10s
CHAOS ?= killing or durability or test_hostile or test_fuzz or test_proof or test_ledger or test_sessions or second_cut or any_byte

.PHONY: demo test quick lint types bench chaos sanitize clean

demo: $(RUN)
	@BIN=$(BIN) DURATION=$(DURATION) sh ./demo.sh

test: lint types
	$(BIN)/python -m pytest

quick: lint types
	$(BIN)/python -m pytest $(TESTS) -k "not ($(CHAOS))"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo --no-cache

types: $(DEV)
	$(BIN)/mypy

bench: $(BENCH)
	$(BIN)/python benchmarks/compare.py

chaos: $(DEV) sanitize
	LONG=1 $(BIN)/python -m pytest -s -k "$(CHAOS)"

# Each process writes what it finds into a report, also one that a test has killed or expects to die.
# Leaks are not looked for, because Python leaves much behind at its end; its own allocator would hide
# overruns; and without libstdc++ the C++ of the greenlets would come too late for libasan.
sanitize: $(SANITIZED).stamp
	@rm -f $(SANITIZED)/report.*
	@LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	PYTHONPATH=$(SANITIZED) PYTHONMALLOC=malloc \
	ASAN_OPTIONS=detect_leaks=0,handle_sigill=2,log_path=$(SANITIZED)/report \
	$(BIN)/python -m pytest $(SANITIZE); code=$$?; \
	if cat $(SANITIZED)/report.* 2>/dev/null; then exit 1; else exit $$code; fi

clean:
	rm -rf .venv .venv-3.* build *.egg-info

# A stamp is newer than the requirements it was installed from: a second run installs nothing. It
# names the version, so an environment of a python3 that has become another one is made anew.
$(RUN): requirements.txt $(TURN)
	$(if $(VERSION),,$(error $(PYTHON) cannot be run; name a Python that can, as in PYTHON=/usr/bin/python3.12))
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m counter.turn.library || true
	@touch $@

$(DEV): requirements-dev.txt $(RUN)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(BENCH): benchmarks/requirements.txt $(RUN)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r benchmarks/requirements.txt
	@touch $@

# The library that requirements.txt installs, made to watch itself. Behind Python's own flags, of which
# -fwrapv and -DNDEBUG hide faults. What is undefined ends in a trap, which libasan reports: together
# with it gcc's other library would write to standard error alone.
$(SANITIZED).stamp: $(TURN) $(DEV)
	rm -rf $(SANITIZED)
	CC=gcc CFLAGS="-g -fsanitize=address,undefined -fsanitize-undefined-trap-on-error \
	-fno-omit-frame-pointer -fno-wrapv -UNDEBUG" \
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
	--target $(SANITIZED) ./counter/turn
	@ls $(SANITIZED)/counter_turn*.so
	@touch $@
