# Every target sets up what it needs first: an environment in .venv, and for the demo the model in .cache/models.
# Arguments go through ARGS: make demo ARGS="--steps 20", make test ARGS="-k plan".
SHELL := /bin/bash
PY := .venv/bin/python
MODEL := .cache/models/SmolLM2-135M-Instruct
PACKAGES := actors kernels placement protocols roles
ARGS ?=
# One thread a process: Rolecall runs many processes, and OpenMP's own threads would fight over the cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup model demo test test-slow test-gpu explore lint types format lock clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

setup: ## the environment alone
	@PYTHON="$(PYTHON)" scripts/setup.sh

model: setup ## the demo's model alone
	@$(PY) -m rolecall.roles.models.fetch $(MODEL)

demo: setup model ## fetch a model and teach it sums by GRPO
	@$(PY) -m rolecall.examples.grpo --model $(MODEL) $(ARGS)

test: setup ## lint, types, rules and tests
	@scripts/check.sh $(ARGS)

test-slow: setup ## the tests that take minutes
	@$(PY) -m pytest -m "slow and not gpu" $(ARGS)

test-gpu: setup ## the tests that need a CUDA device
	@$(PY) -m pytest -m gpu $(ARGS)

explore: setup ## the property tests with examples that nobody has seen (make test uses the same ones each time)
	@HYPOTHESIS_PROFILE=explore $(PY) -m pytest -m "hypothesis and not slow and not gpu" $(ARGS)

lint: setup ## ruff: rules and format
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet . || { echo "not formatted (make format):"; .venv/bin/ruff format --check . | head -20; exit 1; }

# Type checkers can't follow an editable install of mapped folders; they can follow a tree of links that looks like the package.
types: setup ## mypy, strict, on the five packages
	@mkdir -p build/types/rolecall
	@for folder in $(PACKAGES) examples; do ln -sfn ../../../$$folder build/types/rolecall/$$folder; done
	@MYPYPATH=build/types $(PY) -m mypy --namespace-packages --explicit-package-bases $(PACKAGES:%=-p rolecall.%)

format: setup ## let ruff format and repair what it can
	@.venv/bin/ruff check --fix --quiet . || true
	@.venv/bin/ruff format --quiet .

bench-%: setup
	@$(PY) benchmarks/$*.py $(ARGS)

lock: setup ## write the lock from the environment as it is
	@mkdir -p build; { sed -n '/^#/p' requirements.lock; .venv/bin/uv pip freeze --quiet --python $(PY) \
	  | grep -vE '^(-e|pip==|torch==|uv==|nvidia-|triton==|rolecall)'; } > build/lock && mv build/lock requirements.lock

clean: ## remove everything that make made, the environment and the model too
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
