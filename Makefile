# Targets create their virtual environment if it is missing.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# Arguments name=value after a target are overrides for the script: make quickstart loss=dkd seed=1
OVERRIDES := $(filter-out PYTHON=% VENV=%,$(MAKEOVERRIDES))

# One PyTorch thread per process. Bytecode is cached for the many processes that tests start, even if the environment
# disables it.
QUICKLY := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# Test files in parallel, one per core, in the order of tests/conftest.py.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow soak test-lowest lint format audit docs docs-tables build clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1 \2/p' $(MAKEFILE_LIST) | while read -r name what; do printf '  make %-15s%s\n' "$$name" "$$what"; done

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || { \
		echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make install PYTHON=python3.12"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

install: $(INSTALLED) ## create .venv with the tested versions

quickstart: $(INSTALLED) ## teacher, student alone and distilled student on real digits, in a minute (loss=dkd ...)
	$(RUN) scripts/quickstart.py $(OVERRIDES)

test: $(INSTALLED) ## run the default tests, under 5 minutes on 2 cores
	$(QUICKLY) $(RUN) -m pytest -q $(SIDE_BY_SIDE)

test-slow: $(INSTALLED) ## run the slow tests
	$(RUN) -m pytest -q -m slow

soak: $(INSTALLED) ## interrupt hundreds of runs, and count those that resume to the same result
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(RUN) tests/soak.py

test-lowest: ## run the default tests with the lowest supported versions, in .venv-lowest
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	$(QUICKLY) .venv-lowest/bin/python -m pytest -q $(SIDE_BY_SIDE)

lint: $(INSTALLED) ## check style (ruff), import layers and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy scripts

format: $(INSTALLED) ## fix the style with ruff
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

audit: $(INSTALLED) ## check the tested versions for known vulnerabilities (PyPI and OSV)
	$(RUN) -m pip install --quiet --disable-pip-version-check pip-audit
	$(RUN) -m pip_audit --requirement constraints.txt --no-deps --disable-pip

docs: $(INSTALLED) ## build the manual in site/ and check its links
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

docs-tables: $(INSTALLED) ## regenerate the tables of losses in docs/losses.md
	$(RUN) docs/tables.py

build: $(INSTALLED) ## build the wheel in dist/
	$(RUN) -m build --wheel

clean: ## remove build outputs (not data, teachers or runs)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache
