"""Check the layers that methods and targets name, before any case is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from esegeta_monai.engine.network.hooks import find_layer
from esegeta_monai.engine.network.state import unwrap
from esegeta_monai.methods.base import Method

__all__ = ["check_layers"]


def check_layers(network: torch.nn.Module, things: Sequence[Any]) -> None:
    """Check that the layers named by methods (also nested ones) and targets exist.

    Raises:
        UsageError: a layer does not exist; the message lists similar names.
    """
    for thing in things:
        layer = getattr(thing, "layer", None)
        if isinstance(layer, str):
            find_layer(unwrap(network), layer)
        inner = getattr(thing, "method", None)
        if isinstance(inner, Method):
            check_layers(network, [inner])
