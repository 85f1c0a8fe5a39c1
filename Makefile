# make demo      trains the embedded default to the end (needs Python 3.11 or newer, nothing else)
# make test      runs the tests; make test-unit, test-kernels, test-end-to-end a part of them
# make test-all  runs the slow ones too
# make lint      checks style, format and types
# make docs      builds the documentation into build/docs
# make drawings  draws the pictures of docs/cot_layer.md again
#
# PYTHON=... chooses the interpreter, VENV=... the folder of the virtual environment.

VENV ?= .venv
# The first of these that runs and is new enough.
PYTHON ?= $(shell for python in python3.12 python3.11 python3.13 python3 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo "$$python" && break; done)

# One worker more than cores, up to 4: some tests wait for other processes. Files go to the workers
# whole, the longest first (tests/conftest.py).
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS ?= $(shell expr $(CORES) + 1)
PYTEST_FLAGS := -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 20

TESTS := $(VENV)/bin/python -m pytest $(PYTEST_FLAGS)

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-kernels test-end-to-end test-all test-durations lint format docs drawings clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.installed
	$(VENV)/bin/cotnet-train --config=digits --workdir=runs/digits

test: $(VENV)/.installed-test
	$(TESTS) -m "not slow"

test-unit: $(VENV)/.installed-test
	$(TESTS) -m "unit and not slow"

test-kernels: $(VENV)/.installed-test
	$(TESTS) -m "kernels and not slow"

test-end-to-end: $(VENV)/.installed-test
	$(TESTS) -m "end_to_end and not slow"

test-all: $(VENV)/.installed-test
	$(TESTS)

# Records how long each file takes, on an idle machine; the order of the files follows.
test-durations: $(VENV)/.installed-test
	$(TESTS) -m "not slow" --record-durations

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(VENV)/.installed-docs
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env docs build/docs

drawings: $(VENV)/.installed-test
	$(VENV)/bin/python docs/draw_cot_layer.py

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache

# The stamps are made last: an interrupted installation is done again.
$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then \
		echo "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=/path/to/python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created requirements.txt pyproject.toml
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --disable-pip-version-check --editable ".[docs]"
	@touch $@
