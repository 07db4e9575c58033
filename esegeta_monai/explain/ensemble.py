"""An inferer for ensembles and mirrored views, whose maps stay exact and windowed."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.engine.windows.plan import Call, WindowPlan
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.record import described, tensor_hash
from esegeta_monai.utils.upstream import write_count

__all__ = ["Average", "EnsembleInferer"]

Average = Literal["output", "softmax", "sigmoid"]


class EnsembleInferer:
    """The mean over the members of an ensemble and over mirrored views of what one network predicts.

    ``P = Σ_k a_k Σ_m b_m T_m⁻¹ B(f_k(T_m x))``, where B cuts and blends windows as the given inferer does. With
    ``around=False`` the views are those of each window, as in nnU-Net; with ``around=True`` they are those of the
    volume, as in MONAI's test-time augmentation. The two differ where windows or blending weights are asymmetric.
    With ``average="softmax"`` or ``"sigmoid"`` the mean is that of probabilities, ``P = Σ_k a_k φ(P_k)``.

    Args:
        inferer: inferer of one pass; None: the network sees the whole image. One that has views itself keeps them.
        members: the networks, or their state dicts, all of the architecture of the explained network; empty: the
            explained network alone.
        mirror_axes: spatial axes (0, 1, 2); all combinations of them are mirrored.
        weights: weight a_k of each member; None: equal weights.
        around: see above.
        views: the views themselves in place of ``mirror_axes``: ``Call(flips, axes, weight)`` of
            `esegeta_monai.engine.windows.plan`, whose weights b_m count in proportion.
        average: what is averaged over the members: ``"output"`` (the raw outputs), or their ``"softmax"`` or
            ``"sigmoid"``; a target is then a function of the members' predictions and not linear.

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

    members: tuple[dict[str, Tensor], ...]
    views: tuple[Call, ...]
    around: bool
    _inferer: Any

    def __init__(
        self,
        inferer: Any = None,
        members: Sequence[nn.Module | Mapping[str, Tensor]] = (),
        mirror_axes: Sequence[int] = (),
        weights: Sequence[float] | None = None,
        around: bool = False,
        views: Sequence[Call] = (),
        average: Average = "output",
    ) -> None:
        if isinstance(inferer, EnsembleInferer):
            if inferer.members or mirror_axes or views:
                raise UsageError("the inferer already has members, or views beside those given: name them once")
            views, around, inferer = inferer.views, inferer.around, inferer._inferer
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
        if views and self.mirror_axes:
            raise UsageError("give mirror_axes or views, not both")
        if average not in get_args(Average):
            vote = "; a vote has no derivative: average the probabilities instead" if average == "vote" else ""
            raise UsageError(f"average={average!r}: give {', '.join(map(repr, get_args(Average)))}{vote}")
        self.average: Average = average
        self._hashes: dict[int, tuple[tuple[int, ...], str]] = {}
        flips = [c for n in range(len(self.mirror_axes) + 1) for c in itertools.combinations(self.mirror_axes, n)]
        given = tuple(views) or tuple(Call(flips=axes) for axes in flips)
        total = sum(view.weight for view in given)
        self.views = tuple(replace(view, weight=view.weight / total, around=self.around) for view in given)

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict (B, K, …) as MONAI's engines ask an inferer to: the mean over the views, by the given network alone.

        The members are not used: an `EnsembleEvaluator` calls the inferer once for each of its networks.

        Args:
            inputs: images (B, C, *spatial).
            network: the network, which returns one tensor.
            args, kwargs: further arguments of the inner inferer.
        """
        dims = inputs.ndim - 2

        def undone(view: Call, out: Tensor) -> Tensor:
            return view.weight * (view.undo(out, dims) if out.ndim == inputs.ndim else out)

        if not any(view.turned for view in self.views):
            return self._inferer(inputs, network, *args, **kwargs)
        if self.around:
            parts = [undone(v, self._inferer(v.apply(inputs, dims), network, *args, **kwargs)) for v in self.views]
            return torch.stack(parts).sum(0)

        def mean(x: Tensor, *more: Any, **named: Any) -> Tensor:
            return torch.stack([undone(v, network(v.apply(x, dims), *more, **named)) for v in self.views]).sum(0)

        return self._inferer(inputs, mean, *args, **kwargs)

    @property
    def single(self) -> Any:
        """The inferer of one pass, without members and views."""
        return self._inferer

    def declared_windows(self, spatial_shape: Sequence[int], dtype: torch.dtype) -> WindowPlan:
        """Return the windows of all members and views.

        Raises:
            UsageError: an axis that the volume does not have.
            NetworkError: windows that do not fit a turned view, see `WindowPlan.with_calls`.
        """
        plan, shape = plan_windows(self._inferer, spatial_shape, dtype), tuple(spatial_shape)
        for view in self.views:
            if any(axis >= len(shape) for axis in view.flips) or len(view.axes) not in (0, len(shape)):
                raise UsageError(
                    f"the view {view} does not fit an image with {len(shape)} spatial axes: mirror_axes and views name "
                    "axes from 0"
                )
        orders = {view.axes for view in self.views if view.axes}
        turned = {axes: plan_windows(self._inferer, [shape[axis] for axis in axes], dtype) for axes in orders}
        apart = self.average != "output"
        calls = [
            replace(view, member=member, weight=view.weight * (1.0 if apart else weight))
            for member, weight in enumerate(self.weights)
            for view in self.views
        ]
        return replace(plan.with_calls(calls, turned), member_weights=tuple(self.weights) if apart else ())

    def _hash(self, member: int) -> str:
        """Return the SHA-256 of a member's weights; it is computed again only after torch has written to one."""
        weights = self.members[member].values()
        written = tuple(-1 if value.is_inference() else write_count(value) for value in weights)
        known = self._hashes.get(member)
        if known is None or known[0] != written:
            text = tensor_hash(torch.zeros(0), *(tensor_hash(value) for value in weights))
            known = self._hashes[member] = (written, text)
        return known[1]

    @property
    def record(self) -> dict[str, Any]:
        """The parameters that determine the prediction, JSON-ready."""
        views = {} if self.mirror_axes or len(self.views) == 1 else {"views": [_described(v) for v in self.views]}
        return {
            "name": type(self).__name__,
            "inferer": described(self._inferer),
            "members": [self._hash(member) for member in range(len(self.members))],
            "mirror_axes": list(self.mirror_axes),
            "weights": self.weights,
            "around": self.around,
            **({} if self.average == "output" else {"average": self.average}),
            **views,
        }


def _described(view: Call) -> dict[str, Any]:
    return {"flips": list(view.flips), "axes": list(view.axes), "weight": view.weight}


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
