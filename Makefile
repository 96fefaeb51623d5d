# Every target works in a fresh clone with Python 3.11 and nothing else: it makes .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
DEMO := artifacts/demo
SEEING := artifacts/demo-vision
SCHEMA := runtime/manifest.schema.json

.DEFAULT_GOAL := help
.PHONY: help demo test real bench cpus faults fuzz check schema clean

help:  ## Show this
	@sed -n "s/^\([a-z]*\):.*  ## /\1	/p" Makefile

demo: $(VENV)/.export  ## Export the demo bundles, validate them, write text from one, ask one about a picture
	$(BIN)/stillgraph export bundle --out $(DEMO)
	$(BIN)/stillgraph run $(DEMO) --prompt "Once upon a time"
	$(BIN)/stillgraph export bundle -m demo-vision --out $(SEEING)
	$(BIN)/python -m stillgraph.exporter.demo.scenes $(SEEING)/scene.png
	$(BIN)/stillgraph run $(SEEING) --image $(SEEING)/scene.png --chat --prompt "How many shapes are there?"

test: $(VENV)/.dev  ## Run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile

real: $(VENV)/.dev  ## Two real models from PyPI, every promise kept on both, in half an hour and 8 GB of disk
	@$(BIN)/python -m pytest tests/real/promises.py -rs -s

bench: $(VENV)/.dev  ## Ratios to PyTorch beside those kept in tests/ratios, in 3 minutes; warns, never fails
	@$(BIN)/python tests/ratios/check.py artifacts/bench

cpus: $(VENV)/.dev  ## Products and the demo on each class of CPU, emulated where it is another's, in 5 minutes
	@$(BIN)/python -m tests.cpus.table artifacts/cpus

faults: $(VENV)/.dev  ## Interrupts, threads, damage, kills, hostile input, 2000 generations, in 15 minutes; SEED=1
	@$(BIN)/python -m tests.faults.run $(if $(SEED),--seed $(SEED))

fuzz: $(VENV)/.dev  ## Damage and hostile input, ten times as much of it; SEED=1
	@$(BIN)/python -m tests.faults.run --long $(if $(SEED),--seed $(SEED))

check: $(VENV)/.dev  ## Lint, types, and which package may import which
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_arrows.py

schema: $(VENV)/.dev  ## Write the JSON Schema of the manifest
	$(BIN)/python -c "from stillgraph.manifest import json_schema; print(json_schema(), end=str())" > $(SCHEMA)

clean:  ## Remove what the other targets made
	rm -rf $(VENV) $(DEMO) $(SEEING) .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf build dist runtime/exporter runtime/patches
	find export runtime patches tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch before the rest, because it is most of the download.
$(VENV)/.export: pyproject.toml hatch_build.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[export]"
	@touch $@

$(VENV)/.dev: $(VENV)/.export
	$(PIP) -e ".[export,dev]"
	@touch $@
