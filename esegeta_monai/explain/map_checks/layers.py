"""The check of maps of a layer: hooks on the windows that hold one of three voxels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.layer_frames import traced_layers
from esegeta_monai.engine.network.hooks import INPUT
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.plan import Call, last_axes
from esegeta_monai.explain.map_checks.base import FinishedMap, MapCheck, NotChecked, deviation
from esegeta_monai.methods.layer.scattered import reduce_channels
from esegeta_monai.methods.precision import full_precision

__all__ = ["ActivationLayer", "BlendedCam", "ScatteredCam"]


class _Layer(MapCheck):
    """The map near three voxels, its maximum and two random ones, against hooks on the windows that hold them.

    Voxels that lie in further windows are not compared.
    """

    by = "the layer's activations and gradients in the windows at three of its voxels, read by hooks"

    def measure(self, done: FinishedMap) -> CheckResult:
        objective = full_precision(done.objective)
        if objective.model.inferer is not None or objective.plan.slice_axis is not None:
            raise NotChecked("the windows of the network are not those of the layer")
        names = done.notes.get("layer")
        layers = [names] if isinstance(names, str) else list(names or [])
        if not layers:
            raise NotChecked("the record names no layer")
        windows, alone = _around_voxels(done)
        expected = [self.map_at(done, objective, layer, windows)[:, alone] for layer in layers]
        given, truth = done.values[:, alone.to(done.values.device)], self.finish(done, torch.cat(expected))
        if not given.any() and not truth.any():
            raise NotChecked("the map is zero")
        return self.judged(deviation(given, truth), done.bound)

    def map_at(self, done: FinishedMap, objective: Objective, layer: str, windows: list[int]) -> Tensor:
        """Return the map (C, *spatial) that some windows give; it is right at the voxels in no other window."""
        raise NotImplementedError

    def finish(self, done: FinishedMap, expected: Tensor) -> Tensor:
        """Return the map (C, n) after the last operation on it."""
        return expected.relu() if getattr(done.method, "relu", False) else expected


class ActivationLayer(_Layer):
    """``Σ_w ĝ_w · up(A_w)``."""

    def map_at(self, done: FinishedMap, objective: Objective, layer: str, windows: list[int]) -> Tensor:
        return torch.stack(
            [
                objective.plan.share(call) * _blended(objective, own, lambda w: _read(objective, layer, w)[0])
                for call, own in _by_call(objective, windows)
            ]
        ).sum(0)

    def finish(self, done: FinishedMap, expected: Tensor) -> Tensor:
        method: Any = done.method
        return reduce_channels(expected, method.reduce)


class BlendedCam(_Layer):
    """Grad-CAM: the mean gradient of each channel over all windows of the target, times the activations."""

    def map_at(self, done: FinishedMap, objective: Objective, layer: str, windows: list[int]) -> Tensor:
        plan, maps = objective.plan, []
        seen = dict(_by_call(objective, objective.score_windows[done.k]))
        for call, own in _by_call(objective, windows):
            total = torch.zeros(())
            for w in seen.get(call, []):
                gradient = _read(objective, layer, w, done.k)[1]
                positions = math.prod(gradient.shape[1:]) * math.prod(plan.padded_shape) / math.prod(plan.roi)
                total = total.to(gradient) + gradient.flatten(1).sum(1) / positions
            if call not in seen:
                continue
            weights = total.reshape(-1, *(1,) * len(plan.roi))

            def weighted(w: int, weights: Tensor = weights) -> Tensor:
                return (weights * _read(objective, layer, w)[0]).sum(0, keepdim=True)

            maps.append(_blended(objective, own, weighted))
        return torch.stack(maps).sum(0)


class ScatteredCam(_Layer):
    """Products of activations and gradients, position by position, spread over the window.

    Args:
        product: function of activations and gradients (C, *positions).
    """

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.product = product

    def map_at(self, done: FinishedMap, objective: Objective, layer: str, windows: list[int]) -> Tensor:
        if getattr(done.method, "reduce", "sum") != "sum":
            raise NotChecked("the map is not the sum over the layer's channels")
        plan = objective.plan
        total = objective.image.new_zeros((1, *plan.spatial_shape))
        for w in set(windows) & set(objective.score_windows[done.k]):
            values = self.product(*_read(objective, layer, w, done.k)).sum(0, keepdim=True)
            sums = torch.ones_like(values).requires_grad_(True)  # of the interpolation's columns
            with torch.enable_grad():
                (sums,) = torch.autograd.grad(_interpolated(sums, plan.roi).sum(), sums)
            total[last_axes(plan.place(w))] += _unpadded(objective, w, _interpolated(values / sums, plan.roi)).to(total)
        return total


def _around_voxels(done: FinishedMap) -> tuple[list[int], Tensor]:
    """Return the windows that hold the maximum of ``|map|`` or one of two voxels drawn in proportion to it, and the
    voxels (*spatial), bool, that lie in at least one of these windows and in no other."""
    plan, size = done.objective.plan, done.values.abs().sum(0)
    voxels = [[int(i) for i in torch.unravel_index(size.argmax().cpu(), size.shape)], *(v for _, *v in done.drawn(2))]

    def holds(w: int) -> bool:
        return any(all(p.start <= v < p.stop for p, v in zip(plan.place(w), voxel)) for voxel in voxels)

    windows = [w for w in range(len(plan)) if holds(w)]
    alone = torch.zeros(plan.spatial_shape, dtype=torch.bool, device=done.objective.image.device)
    for w in windows:
        alone[plan.place(w)] = True
    for w in set(range(len(plan))) - set(windows):
        alone[plan.place(w)] = False
    if not alone.any():
        raise NotChecked("every voxel near these three lies in further windows")
    return windows, alone


def _by_call(objective: Objective, windows: list[int]) -> list[tuple[Call, list[int]]]:
    """Return the windows of each member and view."""
    grouped: dict[Call, list[int]] = {}
    for w in windows:
        grouped.setdefault(objective.plan.call(w), []).append(w)
    return list(grouped.items())


def _read(objective: Objective, layer: str, window: int, k: int | None = None) -> tuple[Tensor, Tensor]:
    """Return a layer's activations in one window (C, *positions), and their gradient for target k; None: no gradient.

    Both are in the frame of the image, whatever view of the window the network has seen.

    Raises:
        NotChecked: the layer runs several times, or its output is not (n, C, *positions) in the order of the window.
    """
    outputs: list[Any] = []

    def hook(module: Any, args: Any, out: Any) -> Any:
        outputs.append(out)
        return out.clone() if isinstance(out, Tensor) else out  # a later operation may write into it

    def first(value: Any) -> Any:
        return hook(None, None, value.clone() if isinstance(value, Tensor) else value)

    x = objective.window(window).requires_grad_(k is not None)
    module = objective.model.network.get_submodule(layer.removesuffix(INPUT))
    if layer.endswith(INPUT):  # the clone that the layer receives, so that its other uses are not part of the gradient
        handle = module.register_forward_pre_hook(lambda m, args: (first(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(hook)
    try:
        with torch.set_grad_enabled(k is not None):
            out = objective.run(x, [window])
    finally:
        handle.remove()
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor) or not _in_order(objective, layer, outputs[0]):
        raise NotChecked(f"the output of layer {layer!r} is not one map (n, C, *positions) in the order of the window")
    values, call, dims = outputs[0], objective.plan.call(window), len(objective.plan.roi)
    if k is None:
        return call.undo(values[0].detach(), dims), values.new_zeros(())
    cotangent = objective.cotangents([window])[k]
    assert cotangent is not None
    (gradient,) = torch.autograd.grad((out * cotangent.to(out)).sum(), values)
    return call.undo(values[0].detach(), dims), call.undo(gradient[0], dims)


def _in_order(objective: Objective, layer: str, values: Tensor) -> bool:
    """Return True if a layer's output is a map (n, C, *positions) in the order of the window's axes, not finer."""
    frame = traced_layers(objective)[layer].frames[0]
    if frame is None or frame.fixed or not frame.fits(values):
        return False
    mapped = frame.to_map(values.detach())
    roi = objective.plan.roi
    coarser = all(p <= n for p, n in zip(mapped.shape[2:], roi))
    return coarser and mapped.shape == values.shape and torch.equal(mapped, values.detach())


def _interpolated(values: Tensor, roi: tuple[int, ...]) -> Tensor:
    """Interpolate (C, *positions) linearly to (C, *roi)."""
    mode = "bilinear" if len(roi) == 2 else "trilinear"
    return F.interpolate(values[None], size=roi, mode=mode, align_corners=False)[0]


def _unpadded(objective: Objective, window: int, values: Tensor) -> Tensor:
    """Cut the padding off the values (C, *roi) of a window: (C, *place)."""
    plan = objective.plan
    inside = tuple(
        slice(p.start + lo - s.start, p.stop + lo - s.start)
        for p, s, (lo, _) in zip(plan.place(window), plan.slices[window], plan.pads)
    )
    return values[last_axes(inside)]


def _blended(objective: Objective, windows: list[int], make: Callable[[int], Tensor]) -> Tensor:
    """Blend the interpolated maps (C, *positions) of some windows of one call: (C, *spatial), as if there were no
    others."""
    plan, total, weight = objective.plan, None, objective.image.new_zeros(objective.plan.spatial_shape)
    importance = torch.ones(plan.roi) if plan.importance is None else plan.importance
    call = plan.call(windows[0])
    importance = call.undo(importance, len(plan.roi)) if call.around else importance
    for w in windows:
        part = _interpolated(make(w), plan.roi).to(weight)
        total = weight.new_zeros((len(part), *weight.shape)) if total is None else total
        counted = torch.zeros_like(importance)
        counted[plan.counted(w)] = importance[plan.counted(w)]
        total[last_axes(plan.place(w))] += _unpadded(objective, w, part * counted.to(part))
        weight[plan.place(w)] += _unpadded(objective, w, counted[None].to(weight))[0]
    assert total is not None
    return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)
