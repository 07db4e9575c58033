"""The smallest bundle config that can be read."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.synthetic import NETWORK


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def minimal(**more: Any) -> dict[str, Any]:
    """A bundle without an evaluator, as tools that do not use Ignite write it."""
    return {"network_def": dict(NETWORK), "inferer": {"_target_": "SimpleInferer"}, **more}
