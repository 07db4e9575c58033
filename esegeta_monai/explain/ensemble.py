"""An inferer for ensembles and mirrored views, whose maps stay exact and windowed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.engine.windows.plan import Call, WindowPlan
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.record import described, tensor_hash

__all__ = ["EnsembleInferer"]


class EnsembleInferer:
    """The mean of raw outputs over the members of an ensemble and over mirrored views.

    ``P = Σ_k Σ_m a_k / M · T_m⁻¹ B(f_k(T_m x))``, where B cuts and blends windows as the given inferer does. With
    ``around=False`` the views are those of each window, as in nnU-Net; with ``around=True`` they are those of the
    volume, as in MONAI's test-time augmentation. The two differ where windows or blending weights are asymmetric.

    Args:
        inferer: inferer of one pass; None: the network sees the whole image.
        members: the networks, or their state dicts, all of the architecture of the explained network; empty: the
            explained network alone.
        mirror_axes: spatial axes (0, 1, 2); all combinations of them are mirrored.
        weights: weight a_k of each member; None: equal weights.
        around: see above.

    Raises:
        UsageError: members of different architectures, weights that do not fit, or no such axis.

    Example:
        >>> from esegeta_monai import Explainer
        >>> first, second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(1, 2, 3, padding=1)
        >>> explainer = Explainer(first, EnsembleInferer(members=[first, second], mirror_axes=(0, 1)))
        >>> attribution, = explainer(torch.rand(1, 1, 8, 8), ["Saliency"], ["MultiClassMask(1)"])
        >>> attribution.record["windows_total"]
        8
    """

    def __init__(
        self,
        inferer: Any = None,
        members: Sequence[nn.Module | Mapping[str, Tensor]] = (),
        mirror_axes: Sequence[int] = (),
        weights: Sequence[float] | None = None,
        around: bool = False,
    ) -> None:
        self._inferer = as_inferer(inferer)
        self.members = tuple(_weights_of(member) for member in members)
        _check_alike(self.members)
        self.mirror_axes, self.around = tuple(int(axis) for axis in mirror_axes), bool(around)
        count = max(len(self.members), 1)
        self.weights = [1 / count] * count if weights is None else [float(w) for w in weights]
        if len(self.weights) != count:
            raise UsageError(f"weights has {len(self.weights)} entries for {count} member(s)")
        if len(set(self.mirror_axes)) != len(self.mirror_axes) or any(axis < 0 for axis in self.mirror_axes):
            raise UsageError(f"mirror_axes={self.mirror_axes}: give different spatial axes, such as (0, 1, 2)")

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict by one member without mirroring, which is what the inner inferer does."""
        return self._inferer(inputs, network, *args, **kwargs)

    def declared_windows(self, spatial_shape: Sequence[int], dtype: torch.dtype) -> WindowPlan:
        """Return the windows of all members and views.

        Raises:
            UsageError: an axis that the volume does not have.
        """
        plan = plan_windows(self._inferer, spatial_shape, dtype)
        if any(axis >= len(plan.roi) for axis in self.mirror_axes):
            raise UsageError(f"mirror_axes={self.mirror_axes}: the image has {len(plan.roi)} spatial axes")
        views = [c for n in range(len(self.mirror_axes) + 1) for c in itertools.combinations(self.mirror_axes, n)]
        return plan.with_calls(
            [
                Call(member, view, weight / len(views), self.around)
                for member, weight in enumerate(self.weights)
                for view in views
            ]
        )

    @property
    def record(self) -> dict[str, Any]:
        """The parameters that determine the prediction, JSON-ready."""
        return {
            "name": type(self).__name__,
            "inferer": described(self._inferer),
            "members": [tensor_hash(torch.zeros(0), *(tensor_hash(v) for v in m.values())) for m in self.members],
            "mirror_axes": list(self.mirror_axes),
            "weights": self.weights,
            "around": self.around,
        }


def _weights_of(member: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = member.state_dict() if isinstance(member, nn.Module) else member
    return {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}


def _check_alike(members: Sequence[Mapping[str, Tensor]]) -> None:
    shapes = [{name: (value.shape, value.dtype) for name, value in member.items()} for member in members]
    for number, other in enumerate(shapes[1:], 1):
        different = sorted(set(shapes[0].items()) ^ set(other.items()), key=str)
        if different:
            raise UsageError(
                f"members 0 and {number} differ in {different[0][0]!r}: the members of an ensemble share one "
                "architecture; explain networks of other architectures one by one"
            )
