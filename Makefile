PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
# OpenMP threads that spin while they wait slow several processes on one machine down many times over.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test grid check format bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Create .venv and install what requirements.lock pins

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not " + v + "; name one with make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

quickstart: $(READY) ## Fine-tune, prune and quantize a pretrained model in a few minutes
	$(BIN)/python train.py +experiment=quickstart

test: $(READY) ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

check: $(READY) ## Lint, check the formatting and the types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Mend what the linter can, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Time a training step against a bare PyTorch loop; ARGS="--trainer FILE" an epoch too
	$(BIN)/python -m niwaki.measure.bench $(ARGS)

grid: $(READY) ## Run every combination, which takes long; the tests run a part of them
	NIWAKI_GRID=whole OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/test_combinations.py tests/test_grid.py tests/test_compressions.py tests/test_quantizations.py tests/test_tasks.py -rP

docs: $(READY) ## Write docs/ anew: every option of every axis, and what combines with what
	mkdir -p docs
	$(BIN)/niwaki list --markdown > docs/options.md.partial
	mv docs/options.md.partial docs/options.md
	$(BIN)/python -m niwaki.combinations > docs/combinations.md.partial
	mv docs/combinations.md.partial docs/combinations.md

clean: ## Remove what tests, tools and builds left; runs in logs/ and .venv stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache build dist
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
