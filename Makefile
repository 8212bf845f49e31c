# Everything runs in .venv, made from constraints.txt on first use; nothing else needs to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes; every one keeps to one thread.
JOBS ?= 2

.PHONY: demo test test-all lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,deepspeed,eval]'
	touch $@

# One thread: the model is tiny, and where the machine is busy a second one only waits.
demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pop-fit --recipe recipes/tiny.yaml --overwrite

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal -m "not full"

test-all: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

clean:
	rm -rf $(VENV) runs build *.egg-info
