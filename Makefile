# make demo: train on the embedded digits. make test: every check. Both set up .venv first, once.

PYTHON ?= python3
BIN := .venv/bin
# they fork, and what is forked of a process with threads, as pytest-xdist's have, may wait forever
FORKING := tests/test_durable.py tests/test_hostile.py
PARALLEL := -n auto --maxprocesses 4 --dist worksteal $(FORKING:%=--ignore=%)
# percent; a cautious guess until somebody has measured: then the measured value, rounded down
COVERAGE_FLOOR := 80

.PHONY: help setup demo lint types layers test coverage lessons docs bench bench-gpu results clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/installed ## make .venv and install convlens with what its checks need

.venv/installed: pyproject.toml constraints.txt src/convlens/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "convlens needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## train on the embedded digits: accuracy and a report in seconds
	$(BIN)/convlens train digits

lint: setup ## check style and formatting (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## check types (mypy)
	$(BIN)/mypy

layers: setup ## check that imports run downward only (import-linter)
	$(BIN)/lint-imports

test: lint types layers ## lint, types, layers, tests: what CI runs
	$(BIN)/pytest $(PARALLEL)
	$(BIN)/pytest $(FORKING)

coverage: setup ## run the tests that do not fork and fail below the coverage floor
	$(BIN)/pytest $(PARALLEL) --cov --cov-report=term-missing:skip-covered --cov-fail-under=$(COVERAGE_FLOOR)

lessons: setup ## run every lesson from beginning to end (about ten minutes; needs CONVLENS_DATA)
	$(BIN)/pytest -m slow tests/test_lessons.py

docs: setup ## build the site from docs/ and the code into site/, without a network (CONVLENS_RUN_LESSONS=1: with the lessons' outputs, many minutes)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup ## measure speed and write the tables of docs/results/benchmarks.md (about three hours; an idle machine; needs the data)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.run

bench-gpu: setup ## the same recipes on a CUDA device, beside the published speedrun (needs the data)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.run gpu

results: setup ## train every run of docs/results/accuracy.md, write its tables, ship the models (hours; needs the data)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m scripts.results runs
	$(BIN)/python -m scripts.results table
	$(BIN)/python -m scripts.results ship
	$(BIN)/python -m benchmarks.ood

clean: ## remove the environment and caches
	rm -rf .venv build site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage src/*.egg-info
