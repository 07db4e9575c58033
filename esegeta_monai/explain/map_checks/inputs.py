"""Checks of maps of the image: gradients, shares of a sum, and changes under perturbations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.plan import last_axes
from esegeta_monai.explain.map_checks.base import BOUND, FinishedMap, MapCheck, NotChecked, deviation
from esegeta_monai.methods.completeness import FLOOR, is_incomplete
from esegeta_monai.methods.relevance.deeplift import draws

__all__ = ["Cells", "Derivative", "PathShares", "Sum"]

STEP = 1e-7
"""Step of central differences in float64, relative to the standard deviation of the image."""


UNCHECKED = "where its shares lie is not checked, since "


class Derivative(MapCheck):
    """``<map, v>`` against central differences of the whole F in float64.

    The directions are 3 of white noise and the map itself, pooled: ``√Σ(<map, v> − d)² / √Σ d²``. Voxels inside
    constant areas do not move: there, values tie (in max pooling, at the kink of ReLU), and no derivative exists.

    Args:
        times_image: the map is the gradient times the image, so that the image moves by ``x · v``.
    """

    by = "central differences of the target in float64"
    white: ClassVar[int] = 3

    def __init__(self, *, times_image: bool = False) -> None:
        self.times_image = times_image

    def measure(self, done: FinishedMap) -> CheckResult:
        if not done.method.signed:
            raise NotChecked("the map has absolute values")
        f, map_ = done.precise, done.values.to(done.objective.image.device, torch.float64)
        free = ~constant_areas(f.image)
        generator = f.generator()
        directions = [torch.randn(map_.shape, generator=generator, dtype=torch.float64) for _ in range(self.white)]
        norm = float((map_ * free).norm())
        directions += [map_ / norm] if norm > 0 else []
        directions = [v.to(map_) * free for v in directions]
        h = STEP * (float(f.image.std()) or 1.0)
        if self.times_image:
            moves, h = [f.image * v for v in directions], STEP
        else:
            moves = directions
        claimed = torch.stack([(map_ * v).sum() for v in directions])
        measured = torch.stack([directional(f, f.image, move, h) for move in moves])
        if not measured.any() and not claimed.any():
            raise NotChecked("the target does not change outside of constant areas of the image")
        return self.judged(deviation(claimed, measured), done.bound)


def directional(f: Objective, point: Tensor, move: Tensor, h: float) -> Tensor:
    """Return the central difference of F at a point (C, *spatial) along ``move`` (C, *spatial), a scalar; one target.

    The two volumes are computed one after the other, since one volume may fill the memory.
    """
    up, down = (f.value((point + sign * h * move)[None])[0, 0] for sign in (1, -1))
    return ((up - down) / (2 * h)).cpu()


def constant_areas(image: Tensor) -> Tensor:
    """Return which voxels (C, *spatial), bool, lie in a block of 3 voxels along each axis with equal values."""
    pool: Callable[..., Tensor] = F.max_pool2d if image.ndim == 3 else F.max_pool3d
    values = image[None]
    same = pool(values, 3, 1, 1) == -pool(-values, 3, 1, 1)
    return pool(same.to(image), 3, 1, 1)[0] > 0


class Sum(MapCheck):
    """The sum of the map, and its zeros, against F computed again.

    The map and the parts elsewhere that the record lists add up to the change of F, within the method's own bound. The
    map is zero in voxels that no window of the target holds and, with a baseline, in those that are equal to it. Where
    else the shares lie is not checked.

    Args:
        baseline: the sum is ``F(x) − F(x₀)``, the mean over the method's baselines; False: ``F(x)`` without the
            relevance that biases and padding keep, as the record states them.
    """

    by = "the change of the target, computed again"

    def __init__(self, *, baseline: bool = True) -> None:
        self.baseline = baseline

    def measure(self, done: FinishedMap) -> CheckResult:
        references = _references(done) if self.baseline else []
        where = "where its shares lie is checked only in voxels that cannot have any"
        return self.of_sum(done, references) or self.sum_agrees(done, references, where)

    def of_sum(self, done: FinishedMap, references: Sequence[Tensor]) -> CheckResult | None:
        """Return the result of a map whose sum or zeros are wrong, else None.

        Args:
            done: the map.
            references: the baselines x₀ (C, *spatial), float64.
        """
        size = float(done.values.double().abs().sum())
        nowhere = done.unseen()[None].expand(done.values.shape).clone()
        if references:
            nowhere |= torch.stack([(done.precise.image == x0).expand_as(nowhere) for x0 in references]).all(0)
        misplaced = float(done.values[nowhere].double().abs().sum())
        if misplaced > FLOOR * size:
            share = misplaced / size
            what = f"{100 * share:.3g} % of the map lies in voxels that cannot have a share: they are equal to the"
            return self.wrong(f"{what} baseline, or in no window of the target", share)
        gap = self._gap(done, references)
        missed = gap * abs(self._expected(done, references))
        if is_incomplete(done.method, gap, missed / size if size else None):
            recorded = done.notes.get("completeness_gap")
            if recorded is not None and abs(gap - recorded) <= 0.01 * recorded:
                raise NotChecked(f"the map's sum is off by {100 * gap:.3g} %, as the record states")
            return self.wrong(f"the map contradicts {self.by}: its sum is off by {100 * gap:.3g} %", gap)
        return None

    def sum_agrees(self, done: FinishedMap, references: Sequence[Tensor], where: str) -> CheckResult:
        """Return the result of a map whose sum agrees; ``where`` is about its places, references are (C, *spatial)."""
        gap = self._gap(done, references)
        return CheckResult("map", "passed", f"the sum of the map agrees with {Sum.by}; {where}", gap)

    def _gap(self, done: FinishedMap, references: Sequence[Tensor]) -> float:
        expected = self._expected(done, references)
        return deviation(done.values.sum(dtype=torch.float64), torch.tensor(expected))

    def _expected(self, done: FinishedMap, references: Sequence[Tensor]) -> float:
        """Return what the map should add up to; computed once per map."""
        f = done.precise

        def compute() -> float:
            value = float(f.value(f.image[None])[0, 0])
            if references:
                return value - sum(float(f.value(x0[None])[0, 0]) for x0 in references) / len(references)
            elsewhere = sum(float(done.notes.get(name) or 0.0) for name in ("booked", "sum_in_padding"))
            return value - float(f.constants()[0]) - elsewhere

        return f.memo("checked sum", compute)


class PathShares(Sum):
    """As `Sum`, and the shares of three boxes against the integral of the derivative along the straight path.

    The map's share of a box B, weighted by the map itself, is ``<map, u>`` with ``u = map · 1_B``. For integrated
    gradients it is ``∫ d/dε F(x₀ + α (x − x₀) + ε u (x − x₀)) dα``: central differences in float64 at the 9 nodes of
    the midpoint rule. Their difference from the rule of 3 nodes, which are among them, is added to the bound.

    Args:
        only_affine: check the boxes only where the derivative is the same along the path: with DeepLIFT, no unit then
            changes its state, and its multipliers are the derivative. Its other positions have no other definition.
    """

    by = "the change of the target and the shares of three boxes, computed again"
    unresolved: ClassVar[float] = 0.25
    """A quadrature error above this share shows nothing: a halved map deviates by one half."""
    equal: ClassVar[float] = 1e-3
    """Relative spread of the derivative along the path below which F counts as affine on it."""

    def __init__(self, *, only_affine: bool = False) -> None:
        super().__init__()
        self.only_affine = only_affine

    def measure(self, done: FinishedMap) -> CheckResult:
        references = _references(done)
        f, x0 = done.precise, references[0]
        if not getattr(done.method, "multiply_by_inputs", True):  # the shares are the map times x − x₀
            done = replace(done, values=done.values.to(f.image) * (f.image - x0))
        failed = self.of_sum(done, references)
        if failed is not None:
            return failed
        map_, dx = done.values.to(f.image), f.image - x0
        moving = ~(constant_areas(f.image) & constant_areas(x0))
        weights = [u * moving for u in boxes_of(done, map_)]
        claimed = torch.stack([(map_ * u).sum() for u in weights]).cpu()
        if not claimed.any():
            return self.sum_agrees(done, references, f"{UNCHECKED}the map is zero in all boxes")

        def derivatives(alpha: float) -> Tensor:
            return torch.stack([directional(f, x0 + alpha * dx, u * dx, 1e-6) for u in weights])

        coarse = [derivatives(alpha) for alpha in (1 / 6, 1 / 2, 5 / 6)]
        rough = torch.stack(coarse).mean(0)
        if self.only_affine:
            if max(deviation(d, rough) for d in coarse) > self.equal:
                return self.sum_agrees(
                    done, references, f"{UNCHECKED}the target is not affine between baseline and image"
                )
            return self.judged(deviation(claimed, rough), BOUND)
        fine = torch.stack([*coarse, *(derivatives((j + 0.5) / 9) for j in (0, 2, 3, 5, 6, 8))]).mean(0)
        largest = float(max(fine.norm(), claimed.norm()))  # the true shares of a wrong map may be near 0
        unsure, missed = float((rough - fine).norm()) / largest, float((claimed - fine).norm()) / largest
        if unsure > self.unresolved:
            where = f"{UNCHECKED}the derivative varies too much along the path for 9 nodes"
            return self.sum_agrees(done, references, where)
        return self.judged(missed, done.bound + unsure)


def _references(done: FinishedMap) -> list[Tensor]:
    """Return the baselines x₀ (C, *spatial), float64, that the method drew."""
    method: Any = done.method
    baseline, n = baseline_for(method.baseline), getattr(method, "n_samples", 1)
    return [x0.to(done.precise.image) for x0 in draws(baseline, done.objective, n)]


def boxes_of(done: FinishedMap, map_: Tensor) -> list[Tensor]:
    """Return the map (C, *spatial), scaled to at most 1, in each of three boxes, and zero elsewhere.

    Boxes have a third of the image along each axis and centres drawn with probabilities proportional to ``|map|``.
    """
    boxes = []
    for _, *voxel in done.drawn(3):
        box = tuple(slice(max(v - n // 6, 0), v + n // 6 + 1) for v, n in zip(voxel, map_.shape[1:]))
        part, place = torch.zeros_like(map_), last_axes(box)
        part[place] = map_[place]
        boxes.append(part / part.abs().max().clamp(min=torch.finfo(part.dtype).tiny))
    return boxes


class Cells(MapCheck):
    """Three cells of a perturbation map, scored again by plain inference of whole images with the user's inferer.

    Two are drawn with probabilities proportional to ``|map|``, and one at random among the voxels of the target's
    windows.
    """

    by = "three of its cells, scored again by inference of whole images"

    def measure(self, done: FinishedMap) -> CheckResult:
        method, objective, score = done.method, done.objective, done.score
        replaced_at: Callable[..., list[Tensor]] = method.replaced_at  # type: ignore[attr-defined]
        entries = done.drawn(2)
        seen = (~done.unseen()).nonzero()
        pick = int(torch.randint(len(seen), (), generator=objective.generator()))
        entries.append((0, *seen[pick].tolist()))

        def value(image: Tensor) -> float:
            return float(score.value(score.crop(done.infer(image)).double()))

        at_image, expected = value(objective.image), []
        for channel, *voxel in entries:
            drops = [at_image - value(image) for image in replaced_at(objective, channel, tuple(voxel))]
            expected.append(sum(drops) / max(len(drops), 1))
        given = torch.stack([done.values[entry] for entry in entries]).double().cpu()
        truth = torch.tensor(expected, dtype=torch.float64)
        rounding = 100 * torch.finfo(objective.image.dtype).eps * abs(at_image)
        if float(torch.maximum(truth.abs().max(), given.abs().max())) <= rounding:
            raise NotChecked("the changes of the target are as small as its rounding")
        return self.judged(deviation(given, truth), done.bound)
