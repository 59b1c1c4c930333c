# make train: set up and train the default preset; make test: set up and run the tests; make coverage: the share of
# lines that they run; make docs: the site, into site/; make gallery: its pictures; make notebooks: from examples/;
# make test-oldest: the core tests with the oldest versions that setup.cfg allows, in .venv-oldest.
# ARGS goes to train_density.py and to the gallery.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
export OMP_WAIT_POLICY = PASSIVE

.PHONY: train test test-oldest coverage lint slow docs gallery notebooks clean

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
	tests/test_fields.py tests/test_bases.py tests/test_matching.py tests/test_checkpoint.py tests/test_estimators.py tests/test_marginals.py tests/test_tables.py tests/test_fit.py tests/test_settings.py
test-oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed -n 's/^    \([A-Za-z_-]*\)>=\([0-9.]*\)$$/\1==\2.*/p' setup.cfg | sort -u > .venv-oldest/oldest.txt
	.venv-oldest/bin/python -m pip install -q -c .venv-oldest/oldest.txt -e '.[all]' pytest pytest-xdist hypothesis
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -q -n 2 $(CORE)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# without -q, which would hide warnings from --strict; the build itself opens no connection
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gallery: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python docs/tools/gallery.py $(ARGS)

notebooks: $(DOCS_STAMP)
	$(BIN)/python examples/notebooks.py

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $(DOCS_STAMP)

$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[test,dev]'
	timeout 120 $(BIN)/python -m pip install -q -e '.[contrib]' || echo "tests/contrib skips what did not install within two minutes"
	touch $(STAMP)

clean:
	rm -rf .venv .venv-oldest site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
