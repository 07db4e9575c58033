"""Objectives, and what perturbations and gradients should give: computed by MONAI's own inferer on whole volumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.masks import Segments, SmoothMasks
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.methods import Method, run
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.cam.perturbation_cam import _Masks as Masks
from esegeta_monai.targets import Case, MultiClassMask, Score, Target, Voxel


def build_objective(
    model: nn.Module, image: Tensor, scores: Sequence[Score], prediction: Tensor, inferer: object = None, **more: Any
) -> Objective:
    """Build an objective for an image (C, *spatial) and its prediction; the tests make every objective here."""
    model = model if isinstance(model, Model) else Model(model, torch.device("cpu"))
    plan = plan_windows(as_inferer(inferer), image.shape[1:], image.dtype)
    return Objective(model, image, plan, list(scores), prediction, **more)


def objective_of(
    network: nn.Module,
    image: Tensor,
    targets: Sequence[Target],
    inferer: object = None,
    output: str | int | None = None,
    **more: Any,
) -> Objective:
    """Predict an image (C, *spatial) with MONAI's inferer, bind the targets to it and build the objective."""
    model = Model(network.eval(), torch.device("cpu"), output=output)
    with torch.no_grad():
        prediction = as_inferer(inferer)(image[None], model)[0]
    scores = [s for t in targets for s in t.bind(prediction, Case())]
    return build_objective(model, image, scores, prediction, inferer, **more)


def objective(net: nn.Module, image: Tensor, inferer: object, targets: Sequence[Target]) -> tuple[Objective, Tensor]:
    """Build an objective as `objective_of` does; return it with the prediction (K, *spatial)."""
    o = objective_of(net, image, targets, inferer)
    return o, o.prediction


def explain(method: Method, objective: Objective) -> Explained:
    """Run a method while the network is frozen."""
    with frozen(objective.model.network):
        return run(method, objective)


def full_gradient(net: nn.Module, image: Tensor, inferer: object, score: Score) -> Tensor:
    """Differentiate the score through the whole of MONAI's inferer: (C, *spatial)."""
    x = image[None].clone().requires_grad_(True)
    prediction = as_inferer(inferer)(x, net)[0]
    (gradient,) = torch.autograd.grad(score.value(score.crop(prediction)), x)
    return gradient[0]


def naive_change(net: nn.Module, image: Tensor, inferer: Any, score: Score, boxes: Boxes) -> Tensor:
    """Score every perturbation on a copy of the whole volume through MONAI's inferer: (n,)."""
    values = []
    with torch.no_grad():
        base = score.value(score.crop(inferer(image[None], net)[0]))
        for i in range(len(boxes)):
            whole = tuple(slice(0, n) for n in image.shape[1:])
            perturbed = boxes.apply(i, image, whole)
            values.append(score.value(score.crop(inferer(perturbed[None], net)[0])) - base)
    return torch.stack(values)


class Naive:
    """An objective, and the same by whole volumes. Padded along the first axis, blended along the last."""

    def __init__(
        self, net: nn.Module, image: Tensor, targets: list[Target] | None = None, inferer=None, seed: int = 3
    ) -> None:
        dims = image.ndim - 1
        self.net, self.image = net, image
        self.inferer = as_inferer(inferer or SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian"))
        prediction = self.predict(image)
        self.scores = [s for t in targets or [MultiClassMask(1)] for s in t.bind(prediction, Case())]
        self.objective = build_objective(net, image, self.scores, prediction, self.inferer, seed=seed)

    def predict(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inferer(image[None], self.net)[0]

    def value(self, image: Tensor) -> Tensor:
        """F (k,)."""
        prediction = self.predict(image)
        return torch.stack([s.value(s.crop(prediction)) for s in self.scores])

    def change(self, objective: Objective, perturbations: Perturbations) -> Tensor:
        """`esegeta_monai.engine.perturbation.scoring.score_changes`, from what describes the perturbations alone."""
        base = self.value(self.image)
        values = [self.value(perturbed(perturbations, i, self.image)) - base for i in range(len(perturbations))]
        return torch.stack(values, 1)


def perturbed(perturbations: Perturbations, i: int, image: Tensor) -> Tensor:
    """The whole perturbed volume, built without the code under test."""
    if isinstance(perturbations, Boxes):
        gone = torch.zeros(image.shape, dtype=torch.bool)
        channels = slice(None) if perturbations.channels is None else list(perturbations.channels[i])
        gone[(channels, *perturbations.boxes[i])] = True
        return torch.where(gone, torch.as_tensor(perturbations.baseline, dtype=image.dtype), image)
    if isinstance(perturbations, Masks):
        return perturbations.masks[i] * image + (1 - perturbations.masks[i]) * perturbations.baseline
    if isinstance(perturbations, Segments):
        off = np.flatnonzero(~perturbations.coalitions[i])
        gone = torch.from_numpy(np.isin(perturbations.labels.numpy(), off))
        return torch.where(gone, perturbations.baseline, image)
    assert isinstance(perturbations, SmoothMasks)
    mask = whole_mask(perturbations, i)
    return perturbations.baseline + mask * (image - perturbations.baseline)


def whole_mask(masks: SmoothMasks, i: int) -> Tensor:
    mode = {2: "bilinear", 3: "trilinear"}[len(masks.shape)]
    grown = F.interpolate(masks.grids[i][None, None], masks.extent, mode=mode, align_corners=False)[0, 0]
    return grown[tuple(slice(s, s + n) for s, n in zip(masks.shifts[i].tolist(), masks.shape))]


def two_targets(output: str) -> list[Target]:
    return [MultiClassMask(1, output=output), Voxel(0, index=(2, 3), output=output)]
