# make demo           set up, then train the embedded model (minutes on a laptop)
# make install        set up only: .venv, with the versions that constraints.txt pins
# make test           set up, lint and run the tests
# make test-slow      set up, with the compiler for TPUs, and run the slow tests
# make test-gpu       set up and run the tests that need an NVIDIA GPU (EXTRAS=torch,test,cuda)
# make reproduce      set up, train the recorded recipes of examples/ again and compare every row
# make docs           set up and build the documentation site in site/
# make test-install   set up, then install the wheel elsewhere and train with it (a minute)
#
# On Linux, PyPI's torch is the CUDA build (several GB). For the CPU build, name PyTorch's CPU index:
#   make demo EXTRA_INDEX=<the --index-url that pytorch.org/get-started shows for CPU>

PYTHON ?= python3
VENV ?= .venv
EXTRA_INDEX ?=
EXTRAS ?= torch,test

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRAS)

RECORDED ?= examples/embedded/demo examples/embedded/awm

.PHONY: demo install test test-slow test-gpu test-install lint reproduce docs
demo: install
	$(BIN)/python scripts/train.py --config configs/flux_grpo.py

reproduce: install
	set -e; for folder in $(RECORDED); do $(BIN)/python scripts/reproduce.py $$folder; done

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt $(if $(EXTRA_INDEX),--extra-index-url $(EXTRA_INDEX)) torch --editable ".[$(EXTRAS)]"
	touch $@

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-slow: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[aot-tpu]"
	$(BIN)/python -m pytest -m slow -q

test-gpu: install
	JAX_PLATFORMS=cuda CUDA_VISIBLE_DEVICES=0 $(BIN)/python -m pytest -m gpu -q

test-install: install
	$(BIN)/python -m pytest -m slow -q tests/test_install.py
