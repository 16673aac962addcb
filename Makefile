PYTHON ?= python3
BIN := .venv/bin
USER_SETUP := .venv/installed-for-users
DEV_SETUP := .venv/installed-for-developers

.DELETE_ON_ERROR:
.PHONY: train test typed untyped floor lint clean

train: $(USER_SETUP)  ## train LeNet with and without batch norm, then write a report
	$(BIN)/batchnorm train $(ARGS)

# Everything runs once: with annotations checked, but for what is marked `untyped`.
# pytest ends with 5 where ARGS select nothing; the floor of coverage holds for both together.
# Two workers share two cores: threads that wait must not spin.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal --durations 25 --cov $(ARGS)

test: lint  ## everything that CI checks
	$(MAKE) typed
	$(MAKE) untyped

typed: $(DEV_SETUP)  ## the tests, with every annotation checked at run time
	$(PYTEST) -m "not untyped" --typed --cov-report= --cov-fail-under 0 || [ $$? -eq 5 ]

untyped: $(DEV_SETUP)  ## the tests that cannot bear these checks; adds to the coverage of `typed`
	$(PYTEST) -m untyped --cov-append --cov-report term || [ $$? -eq 5 ]

# Not in CI: this torch has no small build on the package index, and brings 5 GB.
floor:  ## the tests of layers and tools with the oldest torch that is supported, in a .venv of its own
	$(PYTHON) -m venv .venv/floor
	sed 's/^torch==.*/torch==2.12.0/' constraints.txt > .venv/floor/constraints.txt
	.venv/floor/bin/pip install --quiet --constraint .venv/floor/constraints.txt --editable '.[all]' \
		beartype expecttest hypothesis pytest pytest-timeout
	.venv/floor/bin/python -m pytest tests/nn tests/tools $(ARGS)

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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --group libraries
	touch $@
