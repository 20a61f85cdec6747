# make demo   learn 2:4 masks of the embedded model and compare them: about three minutes on two cores
# make test   the tests
# make lint   ruff and mypy
# Each makes .venv first; PYTHON names the interpreter (3.10 or later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo table test test-slow lint clean

demo: $(VENV)/ready
	$(BIN)/python benchmarks/embedded_table.py

# The README's table: strategies that learn, three seeds.
# Stopped, it goes on where it was; runs are kept in runs/table.
table: $(VENV)/ready
	$(BIN)/python benchmarks/embedded_table.py --all --seeds 0 1 2 --folder runs/table --save benchmarks/results

test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -m "slow"

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
