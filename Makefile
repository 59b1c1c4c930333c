# make test-oldest: the core tests with the oldest versions that setup.cfg allows, in .venv-oldest.
# make train: set up and train the default preset; make test: set up and run the tests; make coverage: the share of
# lines that they run. ARGS goes to train_density.py.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export OMP_WAIT_POLICY = PASSIVE

.PHONY: train test test-oldest coverage lint slow clean

train: $(STAMP)
	$(BIN)/python train_density.py $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=15

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --cov=cnf --cov-report=term

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=15 -m slow

# lower bounds as constraints (the last patch of the oldest release); extras that the core tests do not need are left out
CORE := tests/test_flow.py tests/test_distribution.py tests/test_conditional.py tests/test_transforms.py tests/test_solvers.py \
	tests/test_fields.py tests/test_bases.py tests/test_matching.py tests/test_checkpoint.py
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed -n 's/^    \([A-Za-z_-]*\)>=\([0-9.]*\)$$/\1==\2.*/p' setup.cfg | sort -u > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/oldest.txt -e '.[data,cli]' pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n 2 $(CORE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[test,dev]'
	timeout 120 $(BIN)/python -m pip install -q -e '.[contrib]' || echo "tests/contrib skips what did not install within two minutes"
	touch $(STAMP)

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
