# `make study` and `make test` do all their set-up on a machine that has only Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
OUT ?= runs/digits
# For `make gpu`: a bare machine's Python, what was carried there, and where the packed results are left.
GPU_DATA ?= .gpu
GPU_OUT ?= runs/gpu
PACK ?= $(GPU_OUT)/packed
TIME_LIMIT ?= 540

.PHONY: study test lint format figures docs clean gpu gpu-dry-run

study: $(STAMP)
	$(BIN)/python -m studies.inverse_errors --preset digits --jobs 2 --resume --out $(OUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

figures: $(STAMP)
	$(BIN)/python -m figures $(OUT)

docs: $(DOCS_STAMP)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -d build/doctrees docs build/docs
	@echo "the docs are in build/docs/index.html"

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("kfacerr needs Python >= 3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[studies,dev]'
	touch $@

# Needs nothing but the machine: no network, no environment; wheels carried in .whl fill in what it lacks.
gpu:
	@if ! $(PYTHON) -c 'import array_api_compat' 2>/dev/null && ls .whl/*.whl >/dev/null 2>&1; then \
	    $(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
	        --target build/site .whl/*.whl; fi
	PYTHONPATH=build/site$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m studies.gpu --data $(GPU_DATA) --accept-modified-data --out $(GPU_OUT) \
	    --pack $(PACK) --time-limit $(TIME_LIMIT) --resume

gpu-dry-run: $(STAMP)
	$(BIN)/python -m studies.gpu --small --data $(GPU_DATA) --out runs/gpu-dry-run --time-limit 300 --resume

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
