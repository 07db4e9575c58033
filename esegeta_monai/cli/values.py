"""Values of options: overrides of a config, names of regions, and the device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from esegeta_monai.errors import UsageError
from esegeta_monai.utils.distributed import local_device

__all__ = ["choose_device", "layer_axes", "overrides", "region_names"]


def overrides(texts: Sequence[str] | None) -> dict[str, Any]:
    """Parse ``id=value`` texts; values are JSON where they parse as JSON, else text.

    Raises:
        UsageError: a text without ``=``.

    >>> overrides(["inferer#roi_size=[32, 32, 32]", "network=@net"])
    {'inferer#roi_size': [32, 32, 32], 'network': '@net'}
    """
    values: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"--override {text}: write id=value, such as inferer#overlap=0.25")
        try:
            values[key] = json.loads(value)
        except ValueError:  # not JSON, so it is text: a reference or an expression of the config
            values[key] = value
    return values


def choose_device(text: str | None) -> torch.device:
    """Return the named device, else the first CUDA device, else the CPU.

    Raises:
        UsageError: this machine has no such device.
    """
    if text is None:
        return local_device()
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UsageError(f"--device {text}: no such device; write cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {text}: this machine has {torch.cuda.device_count()} CUDA device(s); use cpu")
    return device


def layer_axes(words: Sequence[str]) -> dict[str, str]:
    """Read the arguments of ``--layer-axes``, ``LAYER: AXES``.

    Raises:
        UsageError: an argument has no colon.
    """
    wrong = [word for word in words if ":" not in word]
    if wrong:
        raise UsageError(f"--layer-axes {wrong[0]!r}: write the layer, a colon and its axes, 'encoder: n x y z c'")
    return {layer.strip(): axes for layer, _, axes in (word.partition(":") for word in words)}


def region_names(text: str | None) -> dict[int, str] | None:
    """Parse ``1=liver,2=spleen``; None stays None.

    Raises:
        UsageError: the text has another form.

    >>> region_names("1=liver, 2=spleen")
    {1: 'liver', 2: 'spleen'}
    """
    if text is None:
        return None
    parts = [[word.strip() for word in part.split("=", 1)] for part in text.split(",")]
    if any(len(part) < 2 or not part[0].isdigit() or not part[1] for part in parts):
        raise UsageError(f"--region-names {text!r}: write NUMBER=NAME,NUMBER=NAME")
    return {int(number): name for number, name in parts}
