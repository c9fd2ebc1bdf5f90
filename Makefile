# `make study` and `make test` do all their set-up on a machine that has only Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/digits
# Of `make gpu`: the seconds it may take, where its results go, what it runs.
TIME_LIMIT ?= 540
GPU_OUT ?= runs/gpu
GPU_STUDY ?= --preset paper --device cuda --accept-modified-data

.PHONY: study test lint format figures docs peers dist gpu clean

study: $(VENV)/.installed-studies
	$(BIN)/python -m studies.inverse_errors --preset digits --jobs 2 --resume --out $(OUT)

figures: $(VENV)/.installed-studies
	$(BIN)/python -m figures $(OUT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet kfacerr

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --fresh-env -d build/doctrees docs build/docs
	@echo "the docs are in build/docs/index.html"

# The libraries that ours is set beside; without them their tests are skipped.
peers: $(VENV)/.installed-peers

# Wheel and sdist. The wheel holds kfacerr alone: studies and figures run from a checkout.
dist: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist
	$(BIN)/python -m zipfile --list build/dist/*.whl | awk 'NR > 1 && $$1 !~ "^kfacerr(-[^/]*[.]dist-info)?/" \
	    { print "not of kfacerr: " $$1; foreign = 1 } END { exit foreign }'

# One extra of pyproject.toml, and what it needs, at the versions of constraints.txt.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("kfacerr needs Python >= 3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# The gpu-marked tests, then the studies on the images in $KFACERR_DATA. Each has its share of TIME_LIMIT (15% are for
# starts and checkpoints) and goes on where an earlier call left it; one that fails, or whose time is up (124), stops
# no other. Needs neither network nor environment: wheels in .whl are for what the machine's own Python lacks.
gpu: export PYTHONPATH := build/site:$(PYTHONPATH)
gpu:
	@if ! $(PYTHON) -c 'import array_api_compat' 2>/dev/null && ls .whl/*.whl >/dev/null 2>&1; then \
	    $(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
	        --target build/site .whl/*.whl; fi
	@share() { echo $$(($(TIME_LIMIT) * $$1 / 100)); }; failed=0; \
	try() { echo "$$@"; "$$@" || [ $$? = 124 ] || failed=1; }; \
	try timeout $$(share 15) $(PYTHON) -m pytest -m gpu -q -W default -p no:cacheprovider; \
	try $(PYTHON) -m studies.inverse_errors $(GPU_STUDY) --time-limit $$(share 40) --resume --out $(GPU_OUT)/errors; \
	try timeout $$(share 10) $(PYTHON) -m studies.timing $(GPU_STUDY) --out $(GPU_OUT)/errors; \
	try $(PYTHON) -m studies.optimizers $(GPU_STUDY) --time-limit $$(share 20) --resume --out $(GPU_OUT)/optimizers; \
	exit $$failed

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache
