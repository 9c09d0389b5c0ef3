# Everything starts from a fresh clone: `make quickstart` and `make test` make .venv by themselves.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PY := .venv/bin/python

.PHONY: quickstart test parity bench lint format clean

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

parity: .venv/installed-test  ## every comparison with a peer's own code
	$(PY) -m pytest tests/parity -v

bench: .venv/installed-test  ## benchmarks beside the PyTorch peers; writes docs/benchmarks.md
	$(PY) -m bench

lint: .venv/installed-test
	$(PY) -m ruff check .

format: .venv/installed-test
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf .venv .cache build *.egg-info
