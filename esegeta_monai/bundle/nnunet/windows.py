"""nnU-Net's windows as a window plan."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.bundle.nnunet.files import nnunet_module
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import NetworkError

__all__ = ["NnunetWindows"]


class NnunetWindows:
    """nnU-Net's windows: evenly spaced, with its Gaussian weights in float16.

    Args:
        patch: window size; two numbers for a 2D configuration, which sees one slice of the first axis at a time.
        step: distance of windows in window sizes.
    """

    def __init__(self, patch: Sequence[int], step: float = 0.5) -> None:
        self.patch, self.step = tuple(int(n) for n in patch), float(step)

    def declared_windows(self, spatial_shape: Sequence[int], dtype: torch.dtype) -> WindowPlan:
        """Return the windows of a volume; a volume smaller than a window is padded by zeros on both sides."""
        sliding = nnunet_module("nnunetv2.inference.sliding_window_prediction")
        shape, flat = tuple(int(n) for n in spatial_shape), len(self.patch) == 2
        roi = (1, *self.patch) if flat and len(shape) == 3 else self.patch
        missing = [max(r - n, 0) for r, n in zip(roi, shape)]
        padded = tuple(n + m for n, m in zip(shape, missing))
        axes = padded[1:] if len(roi) > len(self.patch) else padded
        starts = sliding.compute_steps_for_sliding_window(axes, self.patch, self.step)
        if len(roi) > len(self.patch):
            starts = [list(range(padded[0])), *starts]
        gaussian = sliding.compute_gaussian(
            self.patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu")
        )
        return WindowPlan(
            shape,
            roi,
            tuple(tuple(slice(a, a + r) for a, r in zip(start, roi)) for start in itertools.product(*starts)),
            tuple((m // 2, m - m // 2) for m in missing),
            importance=gaussian.reshape(roi).to(dtype),
            slice_axis=0 if len(roi) > len(self.patch) else None,
        )

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Not used: the engine blends the windows itself."""
        raise NetworkError("nnU-Net's windows are blended by the engine; give the inferer of NnunetReader")
