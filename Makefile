# Everything a contributor runs. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOWEST := .venv-lowest
LOWEST_INSTALLED := $(LOWEST)/.installed
NEWEST := .venv-newest
# What stands closest to diffusers, transformers, typer and Pillow.
CLOSEST_TESTS := tests/families tests/adapters tests/cli tests/test_config.py tests/media/test_pictures.py $(addprefix tests/swap/test_, $(addsuffix .py, apply intercept steps calls loaded_swaps))
# Triton beside torch, for the checks of CUDA code: the release that torch of constraints.txt asks for on CUDA.
TRITON := build/triton-3.7.1
CUDA_CODE = PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) --durations=5 tests/cuda_code
# Test processes; each gets its share of the cores. WORKERS=0 runs the tests in one process.
WORKERS ?= 2
# Further arguments for pytest: make test ARGS="tests/mechanisms"
ARGS ?=

define new_enough
@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or later is needed, got %d.%d: set PYTHON=..." % v[:2])'
endef

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-lowest test-newest cuda-code cuda-code-all cuda-figures check docs format bench numbers build

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## make .venv with the library and everything for development

$(INSTALLED): pyproject.toml constraints.txt
	$(new_enough)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,demo,metrics,train,quantized,video,face,web]'
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation natten
	@touch $@

demo: $(INSTALLED) ## draw pictures with full and with cheap attention, into outputs/demo
	$(BIN)/diffattn demo --output outputs/demo

test: $(INSTALLED) ## run the tests but for slow ones: some twenty minutes on 2 cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 -m 'not slow' $(ARGS)

test-all: $(INSTALLED) ## run every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(ARGS)

test-lowest: $(LOWEST_INSTALLED) ## run the tests closest to diffusers on the lowest versions in pyproject.toml
	$(LOWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal --durations=5 $(CLOSEST_TESTS) $(ARGS)

test-newest: ## run them on the newest versions that there are, whatever constraints.txt says
	$(new_enough)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable . peft hypothesis pytest pytest-xdist
	$(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal --durations=5 $(CLOSEST_TESTS) $(ARGS)

$(LOWEST_INSTALLED): pyproject.toml constraints-lowest.txt
	$(new_enough)
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable . peft hypothesis pytest pytest-xdist
	@touch $@

cuda-code: $(INSTALLED) $(TRITON) ## interpret and compile the kernels for CUDA, without a GPU: a part of the table
	$(CUDA_CODE) -m 'not slow' $(ARGS)

cuda-code-all: $(INSTALLED) $(TRITON) ## the whole table, half an hour
	$(CUDA_CODE) $(ARGS)

cuda-figures: $(INSTALLED) $(TRITON) ## count the kernels for CUDA anew, into docs/cuda.md
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(BIN)/python scripts/cuda_figures.py docs/cuda.md

$(TRITON): $(INSTALLED)
	rm -rf $@ $@.part
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$(patsubst build/triton-%,%,$@)
	mv $@.part $@

check: $(INSTALLED) ## formatting, lint, types, and the documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.:tests $(BIN)/python scripts/composition_table.py docs/composition.md --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(INSTALLED) ## the documents as a site, into build/site
	$(BIN)/mkdocs build --strict

format: $(INSTALLED) ## write what `make check` asks of formatting and import order
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## time the attention mechanisms on this machine, into outputs/bench
	$(BIN)/diffattn bench --output outputs/bench

numbers: $(INSTALLED) ## measure every mechanism on the bundled pipelines, into docs/numbers.md and the README: half an hour
	$(BIN)/python scripts/numbers/measured_numbers.py docs --readme README.md

build: $(INSTALLED) ## source distribution and wheel, into dist
	$(BIN)/python -m build --no-isolation
