# All targets use a virtual environment inside the checkout; they need only Python >= 3.10, pip and make.
#   make demo        explain the segmentation bundle on the MNI152 template and print the path of the report
#   make test        run the fast tests    make test-slow    run the slow tests
#   make lint types  run ruff and mypy     make docs         build the site in docs/_build/html
#   make dist        build and check the wheel and the sdist in dist/
#   make licences sbom audit               licences, parts and known faults of what a user installs
# Choose another interpreter with `make PYTHON=python3.12 test`, and a mirror or a CUDA index with pip's own settings
# (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS).

PYTHON ?= python3
TORCH := torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
READY := $(VENV)/.ready
DEMO := $(VENV)/.ready-demo
DOCS := $(VENV)/.ready-docs
RELEASE := .venv-release
LOWEST := .venv-lowest
PEERS := .venv-peers
NNUNET := .venv-nnunet
# Two test processes with one thread each: more threads than cores make torch slower.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.PHONY: help setup demo test test-slow test-lowest test-peers test-nnunet compatibility limits faults lint types docs \
  docs-links wheel dist licences sbom audit clean distclean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# A stamp file is newer than its prerequisites, so repeated calls cost nothing. torch is installed first and alone, so
# that later packages find the pinned version and cannot replace it. The demo needs neither itk (1.5 GB) nor the tools.
$(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "esegeta-monai needs Python 3.10 or later; choose one with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Setting up $(VENV), once: 1.5 GB on disk with the CPU build of torch (PIP_EXTRA_INDEX_URL), else 7 GB."
	@$(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(PY) install --quiet pip; }
	@echo "1 of 2: torch ..."
	@$(PIP) "$(TORCH)"
	@echo "2 of 2: esegeta-monai, MONAI and the template of the demo ..."
	@$(PIP) -e ".[demo]"
	@touch $@

$(READY): $(DEMO)
	@echo "Installing the tools for development, and itk ..."
	@$(PIP) -e ".[demo,itk,dev]"
	@touch $@

$(DOCS): $(DEMO)
	@$(PIP) -e ".[demo,docs]"
	@touch $@

demo: $(DEMO)
	$(PY) -m esegeta_monai demo $(DEMO_ARGS)

test: $(READY)
	$(PYTEST) -m "not slow and not peers" $(TEST_ARGS)

test-slow: $(READY)
	$(PYTEST) -m "slow and not peers" $(TEST_ARGS)

# The fast tests with the lowest versions that pyproject.toml allows, in an environment of their own.
$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	@$(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet -r constraints-lowest.txt pytest pytest-xdist pytest-timeout safetensors
	@$(LOWEST)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

test-lowest: $(LOWEST)/.ready
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 -m "not slow and not peers" $(TEST_ARGS)

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
	@$(NNUNET)/bin/python -m pip install --quiet -c constraints.txt -e ".[demo,dev,totalsegmentator]"
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

# Warnings are errors: a link to nowhere, a page in no list, a docstring that cannot be read.
docs: $(DOCS)
	OMP_NUM_THREADS=1 $(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "The site is docs/_build/html/index.html"

# Addresses outside of the site; needs internet.
docs-links: $(DOCS)
	OMP_NUM_THREADS=1 $(PY) -m sphinx -W --keep-going -q -b linkcheck docs docs/_build/links

# Without isolation a wheel can be built offline: setuptools is already installed, because torch needs it.
wheel: $(READY)
	$(PY) -m build --wheel --no-isolation

# Tools of a release in an environment of their own: they must not appear in the lists that they make.
$(RELEASE)/.ready: pyproject.toml
	@$(PYTHON) -m venv $(RELEASE)
	@$(RELEASE)/bin/python -m pip install --quiet \
	  $$($(PYTHON) -c 'import pathlib, re; t = pathlib.Path("pyproject.toml").read_text(); \
	  print(*re.findall(r"\"(.*?)\"", re.search(r"^release = \[(.*?)\]", t, re.M | re.S)[1]))')
	@touch $@

dist: $(RELEASE)/.ready
	rm -rf dist build
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*.whl dist/*.tar.gz
	$(RELEASE)/bin/check-wheel-contents dist/*.whl
	$(RELEASE)/bin/pyroma --min=$(if $(ESEGETA_CONTACT),10,8) dist/*.tar.gz  # 8: all but the address of the authors

# What a user installs: this package's own requirements and theirs, in the versions of $(VENV).
dist/requirements.txt: $(DEMO) pyproject.toml .ci/runtime.py
	@mkdir -p dist
	@$(PY) .ci/runtime.py > $@

licences: $(RELEASE)/.ready dist/requirements.txt
	$(RELEASE)/bin/pip-licenses --python $(PY) --packages $$(sed 's/==.*//' dist/requirements.txt) \
	  --format markdown --with-urls --output-file dist/licences.md

sbom: $(RELEASE)/.ready dist/requirements.txt
	$(RELEASE)/bin/cyclonedx-py requirements --pyproject pyproject.toml --of JSON -o dist/sbom.json \
	  dist/requirements.txt

# --strict: a package that the advisory service does not answer for is an error, not a pass.
audit: $(RELEASE)/.ready dist/requirements.txt
	$(RELEASE)/bin/pip-audit --strict --no-deps --disable-pip -r dist/requirements.txt

clean:
	rm -rf build dist demo_output docs/_build docs/_generated .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find esegeta_monai tests bundles benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean
	rm -rf $(VENV) $(PEERS) $(NNUNET) $(RELEASE) $(LOWEST)
