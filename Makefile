# Everything a fresh clone needs; the only requirements are Python >= 3.11, make and a package index. See `make help`.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

bin := $(VENV)/bin
workers := logical --maxprocesses 4
locks := $(wildcard constraints/*.txt)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow interop test-interop gpu slurm sky lint format lock clean

help: ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "  PYTHON=python3.12: the interpreter behind the environment; VENV=.venv312: another environment; ARGS: for the command"

demo: $(VENV)/.installed-core ## Train, evaluate, fine-tune and export a small GPT on the CPU, in a few minutes.
	@$(bin)/gpt-jax demo $(ARGS)

test: $(VENV)/.installed-test ## Run the quick tests; ARGS="tests/test_config.py -k digest" picks some.
	@$(bin)/python -m pytest -n $(workers) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-test,tpu ## Run the slow tests, compiled with all optimizations, also for TPUs that are not attached.
	@GPT_JAX_REQUIRE_LIBTPU=1 JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(bin)/python -m pytest -n $(workers) --dist worksteal -m slow $(ARGS)

interop: ## Run all tests of exports, imports and benchmarks with torch, transformers and ONNX Runtime, in .venv-interop.
	@$(MAKE) --no-print-directory VENV=.venv-interop test-interop

test-interop: $(VENV)/.installed-interop
	@JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(bin)/python -m pytest -n 2 --dist worksteal tests/interop tests/bench $(ARGS)

# This target installs nothing, so it also works where only the system's Python can use the GPU.
gpu: ## Measure everything on one GPU (docs/benchmarks.md) with VENV's Python, or else PYTHON; ARGS=--rehearse on a CPU.
	@$(if $(wildcard $(bin)/python),$(bin)/python,$(PYTHON)) -m benchmarks.gpu run $(ARGS)

slurm: $(VENV)/.installed-test ## Run the batch file of `gpt-jax launch slurm` on a SLURM of this machine (Debian's slurm-wlm and munge, as root).
	@GPT_JAX_SLURM=1 JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(bin)/python -m pytest -m slow tests/launch/test_slurm_real.py $(ARGS)

sky: $(VENV)/.installed-test .venv-sky/.installed ## Check the tasks of `gpt-jax launch sky` with SkyPilot's own loader, in .venv-sky.
	@GPT_JAX_SKY=.venv-sky/bin/python $(bin)/python -m pytest -m slow tests/launch/test_sky.py $(ARGS)

.venv-sky/.installed:
	@$(PYTHON) -m venv .venv-sky && .venv-sky/bin/python -m pip install --quiet 'skypilot==0.14.*'
	@touch $@

lint: $(VENV)/.installed-lint ## Check style, format and types.
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy

format: $(VENV)/.installed-lint ## Format the code as `make lint` requires.
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

# The locks contain tensorflow as well as tensorflow-cpu, so that one lock serves machines that need either, and the packages that
# drive TPUs and GPUs (libtpu requires glibc 2.31). The packages that only `make interop` needs have separate locks, which agree
# with the others; torch is the same for both versions of Python and is updated by hand.
lock: $(VENV)/.created ## Update the constraints files to the newest versions that work together.
	@$(bin)/python -m pip install --quiet uv
	@for version in 3.11 3.12; do \
	  file=py$$(echo $$version | tr -d .).txt; echo "resolving constraints/$$file"; \
	  compile="$(bin)/uv pip compile --quiet --upgrade setup.cfg - --python-version $$version \
	    --python-platform x86_64-manylinux_2_31 --no-emit-index-url --no-annotate --no-header"; \
	  echo tensorflow | $$compile --extra test --extra lint --extra tpu --extra cuda --output-file constraints/$$file \
	    && printf 'tensorflow\ntorch==2.13.0\n' | $$compile --extra interop --constraint constraints/$$file \
	      --output-file constraints/interop-$$file || exit; \
	done

clean: ## Remove environments, builds and caches. Runs are kept.
	rm -rf $(VENV) .venv-interop .venv-sky build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- the environment --------------------------------------------------------------------------------------------------------

# Begins a recipe line that may take minutes without a word: until its shell ends, the elapsed time is printed every four seconds.
# The shell's number ends the loop even if the shell is killed; background processes do not receive Ctrl-C.
clock := begin=$$(date +%s); \
  while sleep 4 >/dev/null 2>&1 && kill -0 $$$$ 2>/dev/null; do echo "  $$(($$(date +%s) - begin)) s"; done & \
  trap "kill $$! 2>/dev/null" EXIT;

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "gpt_jax needs Python 3.11 or newer, and '$(PYTHON)' is not: name one with PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' \
	  || echo "warning: tested on Python 3.11 and 3.12; this newer one gets the versions locked for 3.12" >&2
	@$(clock) $(PYTHON) -m venv $(VENV)
	@touch $@

# One stamp file for each set of extras, so that the demo does not wait for the packages of the tests.
size := 2.7 GB
$(VENV)/.installed-interop: lock_prefix := interop-
$(VENV)/.installed-interop: size := 4 GB, more where torch brings CUDA
$(VENV)/.installed-%: $(VENV)/.created setup.cfg pyproject.toml $(locks)
	@echo "installing the $* packages into $(VENV): a minute or two the first time ($(size)), less than half a minute later"
	@$(clock) lock=constraints/$(lock_prefix)py$$($(bin)/python -c 'import sys; print(311 if sys.version_info < (3, 12) else 312)').txt; \
	  $(bin)/python -m pip install --quiet --constraint $$lock setuptools \
	  && $(bin)/python -m pip install --quiet --constraint $$lock --no-build-isolation --editable '.$(patsubst [core],,[$*])'
	@touch $@
