# Everything runs inside .venv, which `install` makes; another interpreter: make PYTHON=python3.12 quickstart
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install install-dev quickstart test test-slow test-faults test-cluster check clean

help:
	@echo 'make quickstart   install, then collect data and run a small sweep'
	@echo 'make install      the program with its pinned packages in .venv'
	@echo 'make install-dev  the same, with the tools for tests and checks'
	@echo 'make check        ruff and mypy'
	@echo 'make test         the tests, without those that take minutes'
	@echo 'make test-slow    those that take minutes'
	@echo 'make test-faults  everything is killed at any moment; prints the table of what came out'
	@echo 'make test-cluster those on several hosts, made of namespaces; needs root'
	@echo 'make clean        remove .venv and caches; runs/ and mlflow.db stay'

# The stamps say that an installation was finished with the present pyproject.toml and constraints.txt.
$(BIN)/pip:  # the last thing that venv makes, so that one without it is made again
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $(VENV)/installed $@

install: $(VENV)/installed

install-dev: $(VENV)/installed-dev

quickstart: install
	$(BIN)/tt-ray sweep sweeps/quickstart.yaml --resume

test: install-dev
	$(BIN)/pytest -m 'not slow and not cluster'

test-slow: install-dev
	$(BIN)/pytest -m 'slow and not cluster'

test-faults: install-dev
	$(BIN)/pytest tests/faults

test-cluster: install-dev
	$(BIN)/pytest -m cluster -s tests/cluster

check: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
