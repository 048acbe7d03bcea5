# Everything runs in .venv, which the first target makes (Python 3.11-3.13; about 3 minutes, 7 GB).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python

.PHONY: help demo compare test test-rapids test-lowest test-highest check docs clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

data/glyphs/train.parquet: $(VENV)/installed
	$(RUN) -m b3_lightning glyphs --output data/glyphs

demo: data/glyphs/train.parquet  ## train the quickstart: pictures of characters -> their names
	rm -rf runs/quickstart
	$(RUN) -m b3_lightning fit --config configs/quickstart.yaml

compare: data/glyphs/train.parquet  ## train on random batches, compare the two
	test -d runs/quickstart/export || $(MAKE) demo
	rm -rf runs/quickstart-random
	$(RUN) -m b3_lightning fit --config configs/quickstart.yaml --data.batches=random --run.dir=runs/quickstart-random
	$(RUN) -m b3_lightning compare runs/quickstart-random runs/quickstart --output compare.html

test: $(VENV)/installed  ## run the tests
test-lowest: $(VENV)-lowest-direct/installed  ## the same with the lowest versions that pyproject.toml allows (8 GB)
test-highest: $(VENV)-highest/installed  ## the same with the newest, as pip install would get them (8 GB)
test test-lowest test-highest:
	HF_HUB_OFFLINE=1 $(<D)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal

$(VENV)-rapids/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-rapids
	grep -v '^pandas' constraints.txt > $(VENV)-rapids/constraints.txt  # cuDF needs pandas 3.0
	$(VENV)-rapids/bin/pip install --quiet --upgrade pip
	$(VENV)-rapids/bin/pip install --quiet --constraint $(VENV)-rapids/constraints.txt --editable '.[gpu,test]' basedpyright
	touch $@

test-rapids: $(VENV)-rapids/installed  ## install the real GPU packages (8 GB), test against them; with a GPU, on it
	$(VENV)-rapids/bin/basedpyright --pythonpath $(VENV)-rapids/bin/python --level error \
		b3_lightning/mining/gpu.py b3_lightning/mining/many_gpus.py
	HF_HUB_OFFLINE=1 $(VENV)-rapids/bin/python -m pytest tests/rapids tests/gpu tests/test_gpu.py

# what pyproject.toml allows, where constraints.txt says what is tested every time
$(VENV)-lowest-direct/installed $(VENV)-highest/installed: $(VENV)-%/installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet uv
	$(@D)/bin/uv pip install --quiet --python $(@D) --resolution $* --editable '.[dev]'
	touch $@

check: $(VENV)/installed  ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# the extra alone: the sources are read, not imported, so the site needs no torch
$(VENV)-docs/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(PYTHON) -c 'import tomllib; found = tomllib.load(open("pyproject.toml", "rb")); \
		print(*found["project"]["optional-dependencies"]["docs"], sep="\n")' > $(VENV)-docs/requirements.txt
	$(VENV)-docs/bin/pip install --quiet --constraint constraints.txt --requirement $(VENV)-docs/requirements.txt
	touch $@

docs: $(VENV)-docs/installed  ## build the documentation site into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict  # with --quiet, warnings would pass

clean:  ## remove what the other targets made
	rm -rf $(VENV) $(VENV)-* build/site data/glyphs runs/quickstart runs/quickstart-random
