# make install   the environment (.venv), pinned by constraints.txt
# make test      environment, then all tests, in two processes
# make lint      ruff, mypy, import-linter, and the links of the documentation
# make docs      the documentation as a site, build/site/index.html; renews docs/configuration.md first
# make demo      environment, then the main job end to end; make demo CONFIG=configs/office.yaml for any experiment
PYTHON ?= python3
CONFIG ?= configs/demo.yaml
BIN := .venv/bin

.PHONY: install test lint format docs demo clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "ilrec needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install
	$(BIN)/ilrec schema --readable > docs/configuration.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

demo: install
	$(BIN)/ilrec demo $(CONFIG)

clean:
	rm -rf build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
