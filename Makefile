# All targets use a virtual environment inside the checkout; they need only Python >= 3.10, pip and make.
#   make demo        explain the segmentation bundle on the MNI152 template and print the path of the report
#   make test        run the fast tests    make test-slow    run the slow tests
#   make lint types  run ruff and mypy     make wheel        build the wheel in dist/
# Choose another interpreter with `make PYTHON=python3.12 test`, and a mirror or a CUDA index with pip's own settings
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready
PEERS := .venv-peers
NNUNET := .venv-nnunet
# Two test processes with one thread each: more threads than cores make torch slower.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.PHONY: help setup demo test test-slow test-peers test-nnunet compatibility limits faults lint types wheel clean distclean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# The stamp file is newer than its prerequisites, so repeated calls cost nothing. torch is installed first and alone, so
# that later packages find the pinned version and cannot replace it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "esegeta-monai needs Python 3.10 or later; choose one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; some minutes) ..."
	@$(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip; }
	@$(PIP) "$(TORCH)"
	@$(PIP) -e ".[demo,itk,dev]"
	@touch $@

demo: $(READY)
	$(PY) -m esegeta_monai demo $(DEMO_ARGS)

test: $(READY)
	$(PYTEST) -m "not slow and not peers" $(TEST_ARGS)

test-slow: $(READY)
	$(PYTEST) -m "slow and not peers" $(TEST_ARGS)

# Tests against libraries that need torchvision, which has no CPU-only wheel on PyPI and must not be in the main
# environment (6 GB). torch is pinned exactly (===), because a local CPU build of that version does not fit torchvision.
$(PEERS)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet -c constraints.txt "torch===2.13.0" "torchvision==0.28.0"
	@$(PEERS)/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,dev,torchray]" zennit grad-cam torch-lucent
	@$(PEERS)/bin/python -m pip install --quiet -c constraints.txt --no-deps quantus cachetools  # otherwise a second OpenCV is installed
	@touch $@

test-peers: $(PEERS)/.ready
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -n 2 -m peers $(TEST_ARGS)

# Tests against nnU-Net, which needs torchvision. The environment is made once and keeps its own torch.
$(NNUNET)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(NNUNET)
	@$(NNUNET)/bin/python -m pip install --quiet -c constraints.txt "$(TORCH)"
	@$(NNUNET)/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,dev,nnunet]"
	@touch $@

test-nnunet: $(NNUNET)/.ready
	OMP_NUM_THREADS=1 $(NNUNET)/bin/python -m pytest -n 2 tests/nnunet $(TEST_ARGS)

# Measure missing or outdated cells of the table methods x networks, and write docs/compatibility.md.
compatibility: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m tests.compatibility

# Measure missing or outdated cells of the table methods x odd cases, and write docs/limits.md (about 15 minutes).
limits: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m tests.odd

# Run the whole fault suite and write docs/faults.md.
faults: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m tests.faults

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .

types: $(READY)
	$(VENV)/bin/mypy

# Without isolation a wheel can be built offline: setuptools is already installed, because torch needs it.
wheel: $(READY)
	$(PY) -m build --wheel --no-isolation

clean:
	rm -rf build dist demo_output .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find esegeta_monai tests bundles benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(PEERS)
