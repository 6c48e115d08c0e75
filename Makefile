PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help lab test quick chapters notebooks lint clean

help: ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "expected Python 3.11 or newer, got $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "expected the venv module; on Debian: apt install python3-venv"; exit 1; }
	@echo "installing attnviz into $(VENV): several GB with torch, some minutes the first time"
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[test]'
	@touch $@

lab: $(READY) ## open JupyterLab on the chapters
	@$(BIN)/attnviz lab $(if $(LAB),-- $(LAB))

test: $(READY) lint ## run every test: package, panels in Chromium, chapters
	@$(BIN)/python -m pytest -q tests/browser
	@$(PYTEST) --ignore tests/browser
	@$(BIN)/python -m pytest -q --doctest-modules attnviz
	@$(MAKE) --no-print-directory chapters

quick: $(READY) ## run the tests that need neither minutes nor a browser
	@$(PYTEST) -m "not slow and not browser"

chapters: $(READY) ## run the chapters and compare what they say
	@PYTHONPATH=tests $(PYTEST) -p pictures \
	  --nbval --nbval-current-env --nbval-sanitize-with notebooks/nbval.cfg notebooks

notebooks: $(READY) ## run the chapters and store what they show
	@$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace \
	  --ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.record_timing=False \
	  notebooks/*.ipynb

lint: $(READY) ## check style
	@$(BIN)/ruff check -q . && $(BIN)/ruff format -q --check .

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
