"""The most relevant channels of a layer over cases, and for each channel the most relevant region of a case.

Relevance maximisation (Achtibat et al. 2023): a region is chosen by the relevance of the target through the channel,
not by the channel's activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai.errors import MethodError
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.methods.gradient.saliency import Saliency
from esegeta_monai.methods.layer.relevance import LayerLRP
from esegeta_monai.methods.relevance.concepts import ConceptRelevance
from esegeta_monai.targets.base import Target
from esegeta_monai.targets.neuron import LayerNeuron

__all__ = ["CaseConcepts", "Region", "case_concepts", "channel_region", "ranked_channels"]

FIELD = 0.9
"""Share of the absolute gradient of a unit that its effective receptive field holds."""


@dataclass(frozen=True)
class CaseConcepts:
    """Relevance of a layer's channels for one target of one case.

    Attributes:
        case, target: their names.
        layer: dotted name.
        relevance: relevance R_c of each channel at the layer (C,), in units of the target.
        share: ``|R_c| / Σ_c |R_c|`` (C,), 0 to 1.
        peaks: voxel on the network's grid at which each channel is most relevant, (C, axes).
    """

    case: str
    target: str
    layer: str
    relevance: Tensor
    share: Tensor
    peaks: Tensor


@dataclass(frozen=True)
class Region:
    """The region of a case that is most relevant through a channel.

    Attributes:
        channel: its number.
        concepts: the case, and the channel's share in it.
        box: cut-out on the network's grid, one slice per axis: the effective receptive field of the channel's unit at
            the most relevant position, which holds 90 % of the absolute gradient.
        size: its edges in mm.
        map: `ConceptRelevance` of the channel (C, *spatial), on the network's grid.
        record: its record.
    """

    channel: int
    concepts: CaseConcepts
    box: tuple[slice, ...]
    size: tuple[float, ...]
    map: Tensor
    record: dict[str, Any]


def case_concepts(
    explainer: Explainer, image: MetaTensor, case: str, targets: Sequence[Target], layer: str | None, **inputs: Any
) -> list[CaseConcepts]:
    """Compute the relevance of a layer's channels; targets without voxels give no entry.

    Args:
        explainer: of the network.
        image: (1, C, *spatial).
        case: its name.
        targets: linear targets (``output="logit"``).
        layer: dotted name; None: the default layer.
        inputs: further arguments of the explainer.

    Raises:
        MethodError: relevance cannot be computed; the message is that of `LayerLRP`.
    """
    results = []
    for attribution in explainer(image, [LayerLRP(layer, "channels")], targets, **inputs):
        record = attribution.record
        if record["status"] == "empty_target":
            continue
        if attribution.map is None:
            raise MethodError(f"{case}, {record['target_name']}: {record.get('reason')}")
        maps = attribution.map.as_tensor().double().cpu()
        relevance = maps.flatten(1).sum(1)
        peaks = torch.stack([torch.stack(torch.unravel_index(m.argmax(), m.shape)) for m in maps])
        total = relevance.abs().sum()
        share = relevance.abs() / total if total > 0 else torch.zeros_like(relevance)
        results.append(CaseConcepts(case, record["target_name"], record["layer"], relevance, share, peaks))
    return results


def ranked_channels(cases: Sequence[CaseConcepts], channels: int) -> list[tuple[int, float]]:
    """Rank channels by their mean share over the cases of one target and layer.

    Args:
        cases: at least one.
        channels: how many to return.

    Returns:
        Number and mean share of the most relevant channels, largest first.

    >>> one = CaseConcepts("a", "t", "l", torch.tensor([1.0, -3.0]), torch.tensor([0.25, 0.75]), torch.zeros(2, 3))
    >>> ranked_channels([one], 1)
    [(1, 0.75)]
    """
    mean = torch.stack([c.share for c in cases]).mean(0)
    return [(c, float(mean[c])) for c in mean.argsort(descending=True, stable=True)[:channels].tolist()]


def channel_region(
    explainer: Explainer,
    image: MetaTensor,
    targets: Sequence[Target],
    concepts: CaseConcepts,
    channel: int,
    **inputs: Any,
) -> Region:
    """Compute the region of one case that is most relevant through a channel, and the channel's map.

    Args:
        explainer, image, inputs: see `case_concepts`; image (1, C, *spatial).
        targets: those of `case_concepts`.
        concepts: of the case.
        channel: its number.

    Raises:
        MethodError: a map cannot be computed.
    """
    index = concepts.peaks[channel].tolist()
    method, unit = ConceptRelevance(concepts.layer, channel), LayerNeuron(concepts.layer, channel, index=index)
    through = [a for a in explainer(image, [method], targets, **inputs) if a.record["target_name"] == concepts.target]
    shown, field = through[0], next(iter(explainer(image, [Saliency()], [unit], **inputs)))
    if shown.map is None or field.map is None:
        reason = (shown if shown.map is None else field).record.get("reason")
        raise MethodError(f"{concepts.case}, channel {channel}: {reason}")
    box = effective_box(field.map.as_tensor().cpu().double().sum(0), index)
    affine = torch.as_tensor(image.affine).double()
    affine = affine.reshape(-1, *affine.shape[-2:])[0]
    spacing = affine[: len(box), : len(box)].norm(dim=0).tolist()
    size = tuple((b.stop - b.start) * s for b, s in zip(box, spacing))
    return Region(channel, concepts, box, size, shown.map.as_tensor().cpu(), shown.record)


def effective_box(gradient: Tensor, centre: Sequence[int]) -> tuple[slice, ...]:
    """Return the smallest box around a voxel, grown by one voxel on all sides at a time, that holds `FIELD` of a map.

    Args:
        gradient: absolute gradient of a unit (*spatial).
        centre: voxel.

    >>> effective_box(torch.tensor([0.0, 1.0, 8.0, 1.0, 0.0]), [2])
    (slice(1, 4, None),)
    """
    total, shape = float(gradient.sum()), gradient.shape
    box = tuple(slice(c, c + 1) for c in centre)
    for radius in range(max(shape)):
        box = tuple(slice(max(0, c - radius), min(n, c + radius + 1)) for c, n in zip(centre, shape))
        if float(gradient[box].sum()) >= FIELD * total:
            break
    return box
