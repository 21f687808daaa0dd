# make run   install, build a search engine over the installed documentation, three sample searches
# make test  lint, types, layers, tests, documentation
# make bench measure against the peers and rewrite docs/benchmarks.md
# make docs  build the documentation into site/

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKSPACE ?= workspace

.PHONY: run test lint types docs bench clean

$(VENV)/.run: pyproject.toml constraints.txt tools/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh tools/install.sh "."
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh tools/install.sh ".[dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh tools/install.sh ".[dev,bench]"
	@touch $@

# An interrupted build continues; a finished workspace is kept.
$(WORKSPACE)/manifest.json: $(VENV)/.run
	@test -f $@ || $(BIN)/kexue build --out $(WORKSPACE)

run: $(WORKSPACE)/manifest.json
	$(BIN)/kexue search $(WORKSPACE) "distance between two probability distributions" -k 3
	$(BIN)/kexue search $(WORKSPACE) "find the shortest path in a graph" -k 3
	$(BIN)/kexue search $(WORKSPACE) "learning rate schedule with warmup" -k 3
	@echo "The report is $(WORKSPACE)/report.html. Ask your own: $(BIN)/kexue search $(WORKSPACE) \"...\""

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy

# One thread per worker: two workers on two cores do not fight.
test: lint types
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/pytest -n $${TEST_WORKERS:-2} --durations=10
	$(BIN)/mkdocs build --strict --quiet --site-dir site

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --site-dir site

bench: $(VENV)/.bench
	OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m benchmarks $(ROOMS)

clean:
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
