# Two commands on a fresh machine:
#   make demo    creates .venv, installs pinned versions, generates text with SmolLM2: eager and fusionc side by side
#   make test    the same environment, then ruff, mypy and the tests
#
# PYTHON=python3.12   which interpreter makes .venv (3.10 or newer)
# SYSTEM_SITE=1       use the torch and triton that PYTHON already has (a GPU build, say); they are never replaced
# VENV=path           an environment of your own instead of .venv; with SYSTEM_SITE=1 its torch is kept
# ARGS="..."          more arguments: make demo ARGS="--compare inductor --cold",  make test ARGS="-k cache"
# JOBS=4              parallel test processes (default: one a core, at most 8)

PYTHON ?= python3
VENV ?= .venv
SYSTEM_SITE ?=
ARGS ?=
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
RUNTIME := $(if $(SYSTEM_SITE),requirements/system.txt,requirements/runtime.txt)
PINS := $(if $(SYSTEM_SITE),,-c requirements/constraints.txt)
# A stamp is newer than what it was made from, or its step runs again. pip leaves alone what is already right, and then
# needs no network.
BASE := $(VENV)/.stamp-base
TEST := $(VENV)/.stamp-test

.PHONY: demo test test-slow lint check readme clean help
.DEFAULT_GOAL := help

help:
	@sed -n '2,11s/^# \{0,1\}//p' Makefile

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "fusionc needs Python 3.10 or newer; say which: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(if $(SYSTEM_SITE),--system-site-packages) $(VENV) \
	  || { echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

$(BASE): $(PY) pyproject.toml requirements/build.txt $(RUNTIME) requirements/examples.txt requirements/nodeps.txt requirements/constraints.txt
	@echo "Installing torch, triton, transformers and the weights of SmolLM2 into $(VENV) (once; a minute or more) ..."
	@$(PIP) install -q -r requirements/build.txt -r $(RUNTIME) -r requirements/examples.txt $(PINS)
	@$(PIP) install -q --no-deps -r requirements/nodeps.txt
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(TEST): $(BASE) requirements/test.txt
	@echo "Installing the test tools into $(VENV) (once) ..."
	@$(PIP) install -q -r requirements/test.txt $(PINS)
	@touch $@

demo: $(BASE)
	$(PY) examples/generate.py $(ARGS)

lint: $(TEST)
	$(PY) -m ruff check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "not slow and not network" $(ARGS)

test-slow: $(TEST)
	$(PY) -m pytest -q -n $(JOBS) --dist worksteal -m "slow and not network" $(ARGS)

# The table of passes in README.md, from their docstrings; `check` fails where it is out of date.
readme: $(BASE)
	$(PY) scripts/readme_table.py

check: $(BASE)
	$(PY) scripts/readme_table.py --check

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
