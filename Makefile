PYTHON ?= python3
BIN := .venv/bin
USER_SETUP := .venv/installed-for-users
DEV_SETUP := .venv/installed-for-developers

.DELETE_ON_ERROR:
.PHONY: train test lint typed clean

train: $(USER_SETUP)  ## train LeNet with and without batch norm, then write a report
	$(BIN)/batchnorm train $(ARGS)

test: lint $(DEV_SETUP)  ## everything that CI checks
	$(BIN)/python -m pytest -n 2 --dist worksteal --cov --cov-report=term $(ARGS)
	$(MAKE) typed

typed: $(DEV_SETUP)  ## the suite once more, with every annotation checked at run time
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not untyped and not browser and not images" \
		--jaxtyping-packages=batchnorm,beartype.beartype

lint: $(DEV_SETUP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --warnings
	$(BIN)/lint-imports

clean:
	rm -rf .venv

.venv/bin/pip:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip

$(USER_SETUP): pyproject.toml constraints.txt | .venv/bin/pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

$(DEV_SETUP): $(USER_SETUP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	touch $@
