"""The figures of a case that tests of concepts read: activations of layers over the concept's mask and over random
masks of the same shape, and the derivative of the targets along the layers' channels."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.feature_masks import foreground
from esegeta_monai.engine.layer_regions import MaskedBox, PooledActivations, RegionGradients, SummedGradients
from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request, sweep
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.case import BatchInputs
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.prediction import Prediction
from esegeta_monai.targets.base import Target

__all__ = ["CaseActivations", "case_activations", "objectives_of", "random_masks"]

SHARE = 0.1
"""Largest difference between the shares of a mask and of a random mask that are inside the body."""
PROBED, TRIES, DISTINCT = 4096, 100, 20
"""Voxels of a mask that decide whether it is inside the body, draws per random mask, fewest different places."""


@dataclass(frozen=True)
class CaseActivations:
    """Activations and derivatives of one case at one layer.

    Attributes:
        case, layer: their names.
        pooled: mean activation over each concept's mask (C,), by concept; a concept without a voxel here is left out.
        random: the same over random masks of its shape (K + N, C), by concept: K random concepts and N examples
            without the concept.
        whole: mean activation over the body (C,).
        derivatives: derivative of each target along the channels (C,), by target; empty targets are left out.
        local: the same within each concept's mask and its K + N random masks (1 + K + N, C), by concept and target.
        passes: window passes of the case, all layers together.
    """

    case: str
    layer: str
    pooled: Mapping[str, np.ndarray]
    random: Mapping[str, np.ndarray]
    whole: np.ndarray
    derivatives: Mapping[str, np.ndarray]
    local: Mapping[str, Mapping[str, np.ndarray]]
    passes: int


def random_masks(mask: Tensor, body: Tensor, count: int, rng: np.random.Generator) -> list[MaskedBox]:
    """Move a mask to random places: uniform over those where the same share of it, to within 0.1, is inside the body.

    Places may overlap with each other and with the mask itself, so that the mask is one of equals if its place means
    nothing.

    Args:
        mask: bool (*spatial), with a voxel.
        body: bool (*spatial).
        count: how many.
        rng: the generator.

    Raises:
        InputError: fewer than 20 different places were found, or too few.
    """
    region = MaskedBox.of(mask)
    inside = body.cpu().numpy().astype(bool)
    sizes = np.array(region.mask.shape)
    voxels = np.argwhere(region.mask.cpu().numpy())
    if len(voxels) > PROBED:
        voxels = voxels[np.sort(rng.choice(len(voxels), PROBED, replace=False))]
    own = inside[tuple((voxels + [b.start for b in region.box]).T)].mean()
    room = np.array(inside.shape) - sizes + 1
    places: list[tuple[int, ...]] = []
    for _ in range(TRIES):
        starts = rng.integers(0, room, (count, len(room)))
        at = starts[:, None] + voxels
        shares = inside[tuple(np.moveaxis(at, -1, 0))].mean(1)
        places += [tuple(map(int, s)) for s in starts[np.abs(shares - own) <= SHARE]]
        if len(places) >= count:
            break
    if len(places) < count or len(set(places[:count])) < min(DISTINCT, count):
        raise InputError(
            f"a mask of {len(voxels)} voxels in a box of {'x'.join(map(str, sizes))} has only {len(set(places))} other "
            "places in the body, so that there are no random concepts of its shape: give a smaller mask, or compare "
            "cases with and without the concept (concept cases)"
        )
    return [region.moved(start) for start in places[:count]]


def objectives_of(
    explainer: Explainer, image: Tensor, targets: Sequence[Target], **inputs: Any
) -> tuple[Objective, list[str]]:
    """Return the objective of one case for all targets that have a voxel, and their names.

    Args:
        explainer: of the network.
        image: (1, C, *spatial).
        targets: of the prediction, not of a layer.
        inputs: further arguments of the explainer.

    Raises:
        EsegetaError: the case cannot be predicted, or a target cannot be bound.
    """
    if any(t.layer is not None for t in targets):
        raise UsageError("a concept is tested for targets of the prediction: give no target of a layer")
    settings = explainer.settings
    (case,) = BatchInputs(image, **inputs).cases(settings.output, settings.postprocessing.keys)
    predicted = Prediction(settings, case)
    bound = list(predicted.bind(targets))
    for one in bound:
        if one.error is not None:
            raise one.error
    seen = {b.label: b.score for b in bound if b.score is not None and not b.score.empty}
    return predicted.objective(list(seen.values())), list(seen)


def case_activations(
    explainer: Explainer,
    image: Tensor,
    case: str,
    targets: Sequence[Target],
    layers: Sequence[str | None],
    masks: Mapping[str, Tensor],
    *,
    randoms: int,
    body: Tensor | None = None,
    **inputs: Any,
) -> list[CaseActivations]:
    """Compute what concept tests read of one case: one forward pass of all windows, one backward pass for each target.

    Args:
        explainer: of the network; its seed decides the random masks.
        image: (1, C, *spatial).
        case: its name.
        targets: see `objectives_of`.
        layers: dotted names; None: the default layer.
        masks: concept to mask (*spatial), above 0 where it is; may have no voxel.
        randoms: number of random masks of each concept.
        body: bool (*spatial), where random masks may be; None: the image's foreground.
        inputs: further arguments of the explainer.

    Returns:
        One entry for each layer.

    Raises:
        EsegetaError: the case, a target, a layer or a mask cannot be used.
    """
    settings = explainer.settings
    objective, names = objectives_of(explainer, image, targets, **inputs)
    where = foreground(objective.image) if body is None else torch.as_tensor(body).as_subclass(Tensor) > 0
    regions, counts = [MaskedBox.of(where)], {}
    for name, mask in masks.items():
        there = torch.as_tensor(mask).as_subclass(Tensor) > 0
        if tuple(there.shape) != objective.plan.spatial_shape:
            raise InputError(
                f"{case}: the mask of {name!r} has the shape {tuple(there.shape)}, the image "
                f"{objective.plan.spatial_shape}: give it on the image's grid"
            )
        if not bool(there.any()):
            continue
        rng = np.random.default_rng([settings.seed, zlib.crc32(case.encode()), zlib.crc32(name.encode())])
        counts[name] = len(regions)
        regions += [MaskedBox.of(there), *random_masks(there, where, randoms, rng)]
    results = []
    with evaluating(settings.network, settings.device):
        chosen = [check_layer(objective, layer, several=True) for layer in layers]
        requests: list[Request] = [PooledActivations(layer, regions) for layer in chosen]
        requests += [SummedGradients(layer) for layer in chosen if names]
        requests += [RegionGradients(layer, regions[1:]) for layer in chosen if names and counts]
        values = sweep(objective, requests)
    for i, layer in enumerate(chosen):
        pooled = values[i].numpy()
        along = values[len(chosen) + i].numpy() if names else np.zeros((0, pooled.shape[1]))
        within = values[2 * len(chosen) + i].numpy() if names and counts else np.zeros((0, 0, 0))
        results.append(
            CaseActivations(
                case,
                layer,
                {name: pooled[at] for name, at in counts.items()},
                {name: pooled[at + 1 : at + 1 + randoms] for name, at in counts.items()},
                pooled[0],
                dict(zip(names, along)),
                {n: dict(zip(names, within[:, at - 1 : at + randoms])) for n, at in counts.items()},
                objective.context.progress.passes,
            )
        )
    return results
