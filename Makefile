# make probe   find the micro-batch for the built-in job on this machine's GPU, or on an emulated one
# make serve   the REST service on this machine
# make test    run the tests (no GPU needed)
# make check   lint, format, types
# make bench   run the benchmarks and write tests/benchmarks/results/ (hours; ARGS=--quick for minutes)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: probe serve test test-slow check bench clean

probe: $(VENV)/.installed
	$(BIN)/autobatch probe --target 256 $(ARGS)

serve: $(VENV)/.served
	$(BIN)/autobatch serve $(ARGS)

test: $(VENV)/.tested
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile $(ARGS)

test-slow: $(VENV)/.tested
	$(BIN)/python -m pytest -m "slow and not gpu" --timeout 1800 $(ARGS)

check: $(VENV)/.checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.tested
	$(BIN)/python tests/benchmarks/bench.py $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.served: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[server]"
	touch $@

$(VENV)/.tested: $(VENV)/.served
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/.checked: $(VENV)/.served
	$(BIN)/python -m pip install --quiet --group check --group test
	touch $@
