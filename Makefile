# Everything starts here: `make demo` and `make test` work on a fresh machine with Python 3.11 or
# 3.12, git and make. Variables go on the command line: make TORCH=2.11.0 PYTHON=python3.12 venv

VENV ?= .venv
# torch version to install; empty keeps any torch >= 2.11 that the environment can import
TORCH ?=
# interpreter to make the environment with; empty looks for a suitable one
PYTHON ?=
# set to 1 to see the packages (torch, above all) of the interpreter the environment is made with
SYSTEM_SITE_PACKAGES ?=
export VENV TORCH PYTHON SYSTEM_SITE_PACKAGES

BIN := $(VENV)/bin
UV := $(firstword $(wildcard $(BIN)/uv) uv)
# Named after TORCH, so that asking for another version is not taken for done.
STAMP := $(VENV)/.ready$(TORCH:%=-torch-%)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format typecheck bench lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## make .venv from requirements.lock, and see that a software OpenGL is there

$(STAMP): requirements.lock pyproject.toml .ci/setup
	@rm -f $(VENV)/.ready*
	@.ci/setup
	@touch $@

demo: $(STAMP) ## collect, train, evaluate, report: a small Metaworld policy in outputs/demo (ARGS=key=value)
	@$(BIN)/python scripts/demo.py $(ARGS)

test: $(STAMP) ## everything that must hold: format, lint, types, imports, tests
	@.ci/test

lint: $(STAMP) ## ruff and import-linter
	@$(BIN)/ruff check
	@$(BIN)/lint-imports

format: $(STAMP) ## format the code and sort its imports
	@$(BIN)/ruff check --select I --fix --quiet
	@$(BIN)/ruff format

typecheck: $(STAMP) ## pyright
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMP) ## check the speed invariants that can be checked on a CPU
	@$(BIN)/python -m bench

lock: ## compile requirements.lock from pyproject.toml (needs uv; UPGRADE=1 for newer versions)
	@$(UV) pip compile --config-file .ci/lock.toml --quiet $(if $(UPGRADE),--upgrade) --output-file requirements.lock pyproject.toml

clean: ## remove the environment and the caches; outputs stay
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
