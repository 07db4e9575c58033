"""Cells of the six methods that are silently wrong, or errors, at present: their tests are expected to fail.

An entry that no longer holds must go; the tests are strict.
"""

from __future__ import annotations

from tests.odd.truth import INDEPENDENT

__all__ = ["KNOWN"]

ALL = tuple(INDEPENDENT)

#: by reason: case and methods
_WRONG: dict[str, dict[str, tuple[str, ...]]] = {}

KNOWN: dict[tuple[str, str], str] = {
    (case, method): reason for reason, cases in _WRONG.items() for case, methods in cases.items() for method in methods
}
"""Reason of a failure, by the name of the case and the method."""
