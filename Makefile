# Everything happens in a virtual environment inside the checkout; only Python >= 3.10, pip and make are needed.
#   make demo        explain the segmentation bundle on the MNI152 template and say where the report lies
#   make test        the fast tests        make test-slow    the slow ones
#   make lint types  ruff and mypy         make wheel        the wheel, into dist/
# Choose another interpreter with `make PYTHON=python3.12 test`, a mirror or a CUDA index with pip's own settings
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready
PEERS := .venv-peers
# Two test processes on two cores: more threads than cores make torch slower, not faster.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.PHONY: help setup demo test test-slow test-peers compatibility lint types wheel clean distclean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# The stamp is younger than what it was made from, so a repeated call costs nothing. torch goes first and alone:
# whatever comes later finds the pinned version in place and cannot pull another one.
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

# Oracles that need torchvision, which has no CPU-only wheel on PyPI and must not enter the main environment (6 GB).
# torch is named exactly: a local CPU build of that version does not fit torchvision.
$(PEERS)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet -c constraints.txt "torch===2.13.0" "torchvision==0.28.0"
	@$(PEERS)/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,dev,torchray]" zennit grad-cam torch-lucent
	@$(PEERS)/bin/python -m pip install --quiet -c constraints.txt --no-deps quantus cachetools  # else a second OpenCV
	@touch $@

test-peers: $(PEERS)/.ready
	OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest -n 2 -m peers $(TEST_ARGS)

# Measures what is missing or out of date of the table methods x networks, and writes docs/compatibility.md.
compatibility: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m tests.compatibility

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .

types: $(READY)
	$(VENV)/bin/mypy

# Without isolation: setuptools is already here (torch needs it), so that a wheel can be built offline.
wheel: $(READY)
	$(PY) -m build --wheel --no-isolation

clean:
	rm -rf build dist demo_output .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find esegeta_monai tests bundles benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(PEERS)
