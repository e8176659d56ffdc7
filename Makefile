# Two commands on a fresh machine: `make compare` runs the main job, `make test` passes the tests. Both set up .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: compare test slow speed pages wheel clean

compare: .venv/run.stamp  ## train every default mechanism on the default tasks; report in runs/
	$(BIN)/attnlab compare --out runs $(ARGS)

test: .venv/dev.stamp  ## style, types and every test but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m "not slow" $(ARGS)

slow: .venv/dev.stamp  ## the longer checks: make slow ARGS=tests/nn/softmax
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto -m slow $(ARGS)

speed: .venv/dev.stamp  ## attend and scan beside their peers: ratios, a few minutes on a quiet machine
	$(BIN)/python benchmarks/attend.py
	$(BIN)/python benchmarks/scan.py

pages: .venv/dev.stamp  ## count FLOPs of new backbones, and write the page of what there is
	$(BIN)/python -m attnlab.models.flops
	$(BIN)/python docs/list_systems.py

wheel: .venv/dev.stamp
	$(BIN)/python -m build --wheel --outdir dist

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/run.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[data]'
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@ .venv/run.stamp

clean:
	rm -rf .venv dist build
