# Everything a fresh clone needs, with nothing but Python >= 3.11, make and a package index: `make help`.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin
workers := logical --maxprocesses 4
locks := constraints/py311.txt constraints/py312.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format lock clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "  PYTHON=python3.12: the interpreter behind the environment; VENV=.venv312: another environment; ARGS: for the command"

demo: $(VENV)/.installed-core ## Run the whole story on the CPU: text, tokenizer, training, evaluation, samples.
	@$(bin)/gpt-jax demo $(ARGS)

test: $(VENV)/.installed-test ## Run the quick tests; ARGS="tests/test_config.py -k digest" picks some.
	@$(bin)/python -m pytest -n $(workers) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-test ## Run the slow tests, compiled with all optimisations.
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(bin)/python -m pytest -n $(workers) --dist worksteal -m slow $(ARGS)

lint: $(VENV)/.installed-lint ## Check style, format and types.
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy

format: $(VENV)/.installed-lint ## Put the code into the form that `make lint` asks for.
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

# tensorflow is resolved besides tensorflow-cpu, so that one lock holds on machines that need either of the two.
lock: $(VENV)/.created ## Renew both constraints files with the newest versions that go together.
	@$(bin)/python -m pip install --quiet uv
	@for version in 3.11 3.12; do \
	  file=constraints/py$$(echo $$version | tr -d .).txt; echo "resolving $$file"; \
	  echo tensorflow | $(bin)/uv pip compile --quiet --upgrade setup.cfg - --extra test --extra lint \
	    --python-version $$version --python-platform x86_64-unknown-linux-gnu \
	    --no-emit-index-url --no-annotate --no-header --output-file $$file || exit; \
	done

clean: ## Remove what these commands made: the environment, builds and caches. Runs stay.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the environment --------------------------------------------------------------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "gpt_jax needs Python 3.11 or newer, and '$(PYTHON)' is not: name one with PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' \
	  || echo "warning: tested on Python 3.11 and 3.12; this newer one gets the versions locked for 3.12" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp per set of extras, so that the demo does not wait for the tests' packages.
$(VENV)/.installed-%: $(VENV)/.created setup.cfg pyproject.toml $(locks)
	@echo "installing the $* packages into $(VENV): a minute or two the first time (2.7 GB), less than half a minute later"
	@lock=constraints/py$$($(bin)/python -c 'import sys; print(311 if sys.version_info < (3, 12) else 312)').txt; \
	  $(bin)/python -m pip install --quiet --constraint $$lock setuptools \
	  && $(bin)/python -m pip install --quiet --constraint $$lock --no-build-isolation --editable '.$(patsubst [core],,[$*])'
	@touch $@
