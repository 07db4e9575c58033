"""The tests, and the programs among them (``python -m tests.faults``, …)."""

from __future__ import annotations

import os

# The bundles of the tests are the project's own code, also in the processes that tests start. `tests/cli/test_trust.py`
# removes the variable.
os.environ["ESEGETA_TRUST"] = "1"
