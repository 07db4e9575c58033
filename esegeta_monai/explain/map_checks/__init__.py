"""Checks of finished maps, each by a computation that does not use the method's own code."""

from __future__ import annotations

from typing import Final

import torch

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.errors import RankLost
from esegeta_monai.explain.map_checks.base import FinishedMap, MapCheck, NotChecked, without_time_limit
from esegeta_monai.explain.map_checks.inputs import Cells, Derivative, PathShares, Sum
from esegeta_monai.explain.map_checks.layers import ActivationLayer, BlendedCam, ScatteredCam
from esegeta_monai.utils.tensors import all_finite

__all__ = ["MAP_CHECKS", "FinishedMap", "check_map"]

MAP_CHECKS: Final[dict[str, MapCheck]] = {
    "derivative": Derivative(),
    "derivative times image": Derivative(times_image=True),
    "path": PathShares(),
    "differences": PathShares(only_affine=True),
    "mean of differences": Sum(),
    "relevance": Sum(baseline=False),
    "cells": Cells(),
    "activation": ActivationLayer(),
    "grad-cam": BlendedCam(),
    "activation times gradient": ScatteredCam(torch.mul),
    "activation times positive gradient": ScatteredCam(lambda activations, gradients: activations * gradients.relu()),
}
"""The checks by `esegeta_monai.methods.Method.map_check`."""


def check_map(done: FinishedMap) -> CheckResult:
    """Check a finished map by an independent computation.

    Which one depends on ``map_check`` of the method's own class: a subclass may compute another map.

    Returns:
        The result ``map``: ``passed``; ``warned``: the map contradicts the independent computation; ``not checked``:
        there is none for this kind of map (absolute, squared, normalised or sampled values), or it is not possible.
    """
    check = MAP_CHECKS.get(vars(type(done.method)).get("map_check", ""))
    if check is None:
        return CheckResult("map", "not checked", "no independent check of this kind of map")
    if not all_finite(done.values):
        return CheckResult("map", "not checked", "not checked: the map has values that are NaN or infinite")
    try:
        with without_time_limit(done.objective):
            return check.measure(done)
    except RankLost:
        raise
    except NotChecked as reason:
        return CheckResult("map", "not checked", f"not checked: {reason}")
    except Exception as error:  # the map is there, and a network may fail in any way in a further pass
        return CheckResult("map", "not checked", f"not checked: the check fails ({' '.join(str(error).split())[:200]})")
