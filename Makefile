# Works with GNU make 3.81 (macOS) and later. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
# Test files that run at a time: most tests wait more than they compute.
JOBS ?= 3
BIN := .venv/bin

# All checks, whatever fails; arguments for pytest. What mypy finds, beside the first tests, is shown after them.
checked = failed=0; types=$$(mktemp); \
	check() { echo "$$*"; "$$@" || { failed=1; echo "make $@: FAILED: $$*" >&2; }; }; \
	$(BIN)/mypy >$$types 2>&1 & mypy=$$!; \
	check $(BIN)/ruff format --check .; \
	check $(BIN)/ruff check .; \
	check $(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder $(1) $(ARGS); \
	echo $(BIN)/mypy; \
	wait $$mypy || { failed=1; echo "make $@: FAILED: $(BIN)/mypy" >&2; }; \
	cat $$types; rm $$types; \
	exit $$failed

.PHONY: help train test test-all test-nightly test-gpu lint format docs bench clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

train: .venv/installed ## Install what is missing and train configs/quickstart.yaml (or CONFIG=...)
	$(BIN)/dist-train train $(CONFIG)

test: .venv/installed-dev ## Check what most changes can break: format, lint, types, tests (ARGS="-k resume" goes to pytest)
	@$(call checked,-m "not long and not slow and not slurm and not nightly")

test-all: .venv/installed-dev ## Check every guarantee: also long matrices, faults, a real Slurm, every command in the docs
	@$(call checked,-m "not nightly")

test-nightly: .venv/installed-dev ## Measure in full what test-all checks in short: all faults, a recipe's accuracy, the whole table
	@$(call checked,-m nightly)

test-gpu: .venv/installed-dev ## Check the guarantees on this machine's GPUs; without one all is skipped
	$(BIN)/python -m pytest tests/gpu $(ARGS)

lint: .venv/installed-dev ## Check format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/installed-dev ## Format the code and fix what can be fixed
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

docs: .venv/installed-dev ## Make a site of the documentation in site/, which opens without a network
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "written: site/index.html"

bench: .venv/installed ## Run all benchmarks (one: .venv/bin/python benchmarks/overhead.py)
	@for file in benchmarks/[a-z]*.py; do \
	  echo "$(BIN)/python $$file"; $(BIN)/python "$$file" || exit 1; \
	done

clean: ## Delete .venv, builds and caches; runs/ stays
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name runs -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# Written last by `python -m venv`: a half-made .venv is made again.
.venv/bin/activate:
	@$(PYTHON) -c 'import sys; v = sys.version_info; (3, 10) <= v < (3, 14) or sys.exit("dist_train needs Python 3.10 to 3.13, but $(PYTHON) is %d.%d; give another, as in: make train PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv

# Stamps: the project is installed again only after pyproject.toml changed.
.venv/installed: pyproject.toml .venv/bin/activate
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

.venv/installed-dev: pyproject.toml .venv/bin/activate
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch .venv/installed $@
