# make train: set up and train the default preset; make test: set up and run the tests; make coverage: the share of
# lines that they run; make docs: the site, into site/; make gallery: its pictures; make notebooks: from examples/.
# ARGS goes to train_density.py and to the gallery.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DOCS_STAMP := .venv/.installed-docs
export OMP_WAIT_POLICY = PASSIVE

.PHONY: train test coverage lint slow docs gallery notebooks clean

train: $(STAMP)
	$(BIN)/python train_density.py $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=15

coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --cov=cnf --cov-report=term

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=15 -m slow

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
	touch $(STAMP)

clean:
	rm -rf .venv site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
