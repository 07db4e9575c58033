"""Reference maps of layer methods: hooks on the layer while MONAI's own inferer runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.inferers import as_inferer
from esegeta_monai.targets import ClassScore, MultiClassMask, Target
from tests.networks import CLASSIFICATION, build
from tests.support.objectives import objective_of
from tests.support.tensors import DOUBLE

UP = {2: "bilinear", 3: "trilinear"}


@dataclass
class Setting:
    """A network of `tests.networks`, a volume of several gaussian windows, and the layer that is looked at."""

    network: nn.Module
    image: Tensor
    inferer: object
    objective: Objective
    layer: str
    output: str | int | None

    @property
    def roi(self) -> tuple[int, ...]:
        return self.objective.plan.roi

    def model(self, x: Tensor) -> Tensor:
        """The network; a copy of its output, since MONAI's inferer works on it in place."""
        return self.objective.model(x).clone()

    def pass_(self, target: int = 0) -> tuple[Tensor, Tensor]:
        """Activations (W, …) of all windows, and the gradient of F there by autograd through the whole inferer."""
        kept: list[Tensor] = []
        layer = self.network.get_submodule(self.layer)
        handle = layer.register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
        x = self.image[None].clone().requires_grad_(True)
        prediction = self.inferer(x, self.model)[0]
        handle.remove()
        score = self.objective.scores[target]
        gradients = torch.autograd.grad(score.value(score.crop(prediction)), kept)
        return self.as_map(torch.cat(kept).detach()), self.as_map(torch.cat(gradients))

    def as_map(self, values: Tensor) -> Tensor:
        """Tokens (W, T, C) on their grid."""
        if values.ndim > 3:
            return values
        patch = 4
        grid = [n // patch for n in self.roi]
        return values[:, -torch.Size(grid).numel() :].movedim(-1, 1).reshape(len(values), -1, *grid)

    def blend(self, weights: Tensor) -> Tensor:
        """``up(Σ_c w_c A_c)`` blended by MONAI's own inferer, (1, *spatial); weights (C,), or (D, C) for D maps."""

        def weighted(x: Tensor) -> Tensor:
            kept: list[Tensor] = []
            layer = self.network.get_submodule(self.layer)
            handle = layer.register_forward_hook(lambda m, i, o: kept.append(o.clone()))
            self.model(x)
            handle.remove()
            small = torch.einsum("dc,nc...->nd...", torch.atleast_2d(weights), self.as_map(kept[0]))
            return F.interpolate(small, size=self.roi, mode=UP[len(self.roi)])

        with torch.no_grad():
            return self.inferer(self.image[None], weighted)[0]

    def scatter(self, values: Tensor) -> Tensor:
        """Window maps (W, C, *positions) spread with their sums kept, and added: (C, *spatial)."""
        ones = torch.ones_like(values).requires_grad_(True)
        up = F.interpolate(ones, size=self.roi, mode=UP[len(self.roi)])
        (share,) = torch.autograd.grad(up.sum(), ones)
        wide = F.interpolate(values / share, size=self.roi, mode=UP[len(self.roi)])
        total = torch.zeros(values.shape[1], *self.image.shape[1:], dtype=values.dtype)
        for window, place in zip(wide, self.objective.plan.slices):
            total[(slice(None), *place)] += window
        return total


def setting(name: str, dims: int = 2, target: Target | None = None, layer: str | None = None) -> Setting:
    """One and a half windows along the last axis: three gaussian windows (one for a classification network)."""
    case = build(name, dims)
    image, inferer = case.image[0], as_inferer(None)
    if case.kind == CLASSIFICATION:
        target = target or ClassScore(1)
    else:
        half = case.roi[-1] // 2
        image = torch.cat([case.image, case.reference[..., :half]], -1)[0]
        inferer = SlidingWindowInferer(case.roi, 2, 0.625, "gaussian")
        target = target or MultiClassMask(1)
    objective = objective_of(case.network, image, [target], inferer, case.output)
    return Setting(case.network, image, inferer, objective, layer or case.cam_layer, case.output)


def position_weights(s: Setting) -> Tensor:
    """ĝ_w averaged over each position's cell, (W, *positions), from MONAI's importance map."""
    plan, (activations, _) = s.objective.plan, s.pass_()
    grid = activations.shape[2:]
    if plan.whole:
        return torch.ones(1, *grid, dtype=DOUBLE)
    count = torch.zeros(plan.padded_shape, dtype=DOUBLE)
    for place in plan.slices:
        count[place] += plan.importance
    cells = [n // g for n, g in zip(plan.roi, grid)]
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(grid)]
    return torch.stack([pool((plan.importance / count[p])[None], cells)[0] for p in plan.slices])


def flat(values: Tensor) -> Tensor:
    """Window maps (W, C, *positions) with one row per channel: (C, W · positions)."""
    return values.movedim(1, 0).flatten(1)
