# Everything starts from a fresh clone: `make quickstart` and `make test` make .venv by themselves.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PYTHON312 ?= python3.12
PY := .venv/bin/python

.PHONY: quickstart test test-312 parity faults bench lint format clean

# pip, not another installer: it finds the CPU build of torch that a machine may offer.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mmjax needs Python 3.11 or newer; $(PYTHON) is older. Set PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q --upgrade pip 2>/dev/null
	$(PY) -m pip install -q -e '.[recipes]' 2> >(grep -v "is ignored: it is neither" >&2)
	@touch $@

.venv/installed-test: .venv/installed
	$(PY) -m pip install -q torch==2.13.0 2> >(grep -v "is ignored: it is neither" >&2)
	$(PY) -m pip install -q -e '.[dev]' 2> >(grep -v "is ignored: it is neither" >&2)
	@touch $@

quickstart: .venv/installed  ## learn to read tiny digits in photographs, in minutes on a CPU
	$(PY) train.py --config=configs/quickstart.py --workdir=runs/quickstart
	@echo "Open runs/quickstart/report.html in a browser."

test: .venv/installed-test  ## the whole test suite
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n 2 --dist loadfile

# The second leg: the newest jax and flax, which need Python 3.12. No torch, so no peers.
test-312:  ## import, step, generation and a quick run on Python 3.12
	test -x .venv312/bin/python || $(PYTHON312) -m venv .venv312
	.venv312/bin/python -m pip install -q -e '.[recipes]' pytest
	.venv312/bin/python -m pytest tests/test_imports.py tests/ops tests/multidevice tests/generate
	rm -rf runs/quick312
	.venv312/bin/python train.py --config=configs/quickstart.py:quick --workdir=runs/quick312

parity: .venv/installed-test  ## every comparison with a peer's own code
	$(PY) -m pytest tests/parity -v

faults: .venv/installed-test  ## 50 random kills of a training run, also during saves: nothing may be lost
	$(PY) -m tests.e2e.faults --kills=50

bench: .venv/installed-test  ## benchmarks beside the PyTorch peers; writes docs/benchmarks.md
	$(PY) -m bench

lint: .venv/installed-test
	$(PY) -m ruff check .

format: .venv/installed-test
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf .venv .cache build *.egg-info
