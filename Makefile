# Two commands do everything on a fresh machine, set-up included: `make demo` and `make test`.

PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test test-slow lint docs parity wheel-test clean

help:
	@echo "make demo        train a small model from feedback, on CPU or GPU, and show before and after"
	@echo "make test        the quick tests"
	@echo "make test-slow   all tests, the full parity product included"
	@echo "make lint        format, lint, types, spelling, import contracts"
	@echo "make docs        the documentation as a site, in build/site; broken links are errors"
	@echo "make parity      the parity table against TRL"
	@echo "make wheel-test  build the wheel, install it into an environment of its own, train with it"

# Made again whenever the dependencies change. With torch installed first, nothing else asks for it.
$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[dev]"
	touch $@

demo: $(BIN)/.installed
	$(BIN)/python -m kto_lightning.demo

# Two processes of one thread each: with more, tiny models wait for their threads.
test: export OMP_NUM_THREADS ?= 1
test: $(BIN)/.installed
	$(BIN)/pytest -n 2 --dist worksteal

test-slow: export OMP_NUM_THREADS ?= 1
test-slow: $(BIN)/.installed
	$(BIN)/pytest -n 2 --dist worksteal -m "not gpu"

lint: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/lint-imports

docs: $(BIN)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

parity: $(BIN)/.installed
	$(BIN)/python -m tests.parity.table

wheel-test: $(BIN)/.installed
	$(BIN)/pytest -m slow tests/test_wheel.py

clean:
	rm -rf .venv demo_output output
