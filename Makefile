# make demo     learn 2:4 masks of the embedded model: a few minutes on two cores
# make compare  every strategy on it, three seeds, and the report; two hours
# make test     the tests; test-slow and test-browser those that need minutes, or Chromium
# make lint     ruff and mypy
# make docs     the documentation site, in site/
# Each makes .venv first; PYTHON names the interpreter (3.10 or later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo compare test test-slow test-browser lint docs clean

demo: $(VENV)/ready
	$(BIN)/python benchmarks/embedded_table.py

# The README's figures. Stopped, it goes on where it was; runs are kept in runs/compare.
compare: $(VENV)/ready
	$(BIN)/python benchmarks/embedded_table.py --all --seeds 0 1 2 --jobs 2 --folder runs/compare --save benchmarks/results
	$(BIN)/sparsify compare runs/compare --html runs/compare/report.html --plan configs/shapes/llama2_7b

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not gpu and not browser" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m "slow"

test-browser: $(VENV)/ready
	$(BIN)/python -m pytest -m "browser"

docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

# Type checkers cannot follow an editable install whose packages lie in mapped folders: check an installed copy.
lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/typed .
	cd build && MYPYPATH=typed ../$(BIN)/mypy --config-file ../pyproject.toml -p sparsify

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
