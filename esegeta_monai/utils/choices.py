"""Values that options accept, apart from the modules that use them, whose imports take long."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["HEADS", "TRUST_VARIABLE", "HeadKind"]

HeadKind = Literal["softmax", "sigmoid", "softmax inside", "sigmoid inside", "log-softmax inside", "raw", "unknown"]
HEADS = tuple(kind for kind in get_args(HeadKind) if kind != "unknown")
"""The kinds of a network's output that a user may state."""

TRUST_VARIABLE = "ESEGETA_TRUST"
"""Environment variable: with the value 1, every bundle may run."""
