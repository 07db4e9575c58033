"""Localisation: agreement of the map with the known place of the cause.

All use the magnitude of the map, summed over channels (`esegeta_monai.metrics.base.magnitude`). For tied voxels the
value is the expectation over all their orders, so that a flat map gains nothing from the order of its voxels.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.metrics.base import Metric, MetricInput, MetricResult, Sign, magnitude

__all__ = ["DistanceProfile", "LocalisationAUC", "PointingGame", "RelevanceMass", "RelevanceRank", "TopKIntersection"]
__all__ += ["SHELLS_MM", "distance_mm", "shells"]

SHELLS_MM = (0.0, 5.0, 10.0, 20.0)
"""Edges of the distance shells: inside, 0-5, 5-10, 10-20 mm, beyond."""


class _Localisation(Metric):
    """Base class of localisation metrics. Subclasses have the parameter ``sign``, the part of the map that is used."""

    group = "localisation"
    higher_is_better = True
    needs = frozenset({"label"})

    def _parts(self, subject: MetricInput) -> tuple[Tensor, Tensor]:
        """Return magnitude (n,), float64, and label (n,), bool, over all voxels."""
        assert subject.label is not None
        values = magnitude(subject.map, getattr(self, "sign")).flatten()  # noqa: B009 - a field of the subclasses
        return values, subject.label.to(values.device).flatten()


class PointingGame(_Localisation):
    """1 if the strongest voxel is in the label, else 0 (Zhang et al. 2018); over maps, the hit rate.

    Args:
        tolerance_mm: voxels up to this distance from the label count as hits.
        sign: part of the map that is used: ``"absolute"``, ``"positive"`` or ``"negative"`` values.
    """

    reference = "Zhang et al., IJCV 2018, arXiv:1608.00507"
    meaning = "Share of maps whose strongest voxel lies in the label; chance is the label's share of the volume."
    proportion = True

    tolerance_mm: float = 0.0
    sign: Sign = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance_mm < 0:
            raise UsageError(f"PointingGame: tolerance_mm={self.tolerance_mm} must be at least 0")

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]; a zero map misses."""
        values, label = self._parts(subject)
        if self.tolerance_mm > 0:
            if subject.spacing is None or subject.label is None:
                raise MetricError(f"{self.name}(tolerance_mm={self.tolerance_mm}) needs the voxel size in mm")
            near = distance_mm(subject.label, subject.spacing) <= self.tolerance_mm
            label = near.to(label.device).flatten()
        strongest = values == values.max()
        hit = float(label[strongest].double().mean()) if float(values.max()) > 0 else 0.0
        return MetricResult(
            hit, notes={"strongest_voxels": int(strongest.sum()), "chance": float(label.double().mean())}
        )


class RelevanceMass(_Localisation):
    """The share of the map's magnitude in the label: ``Σ_label |a| / Σ |a|`` (Arras et al. 2022).

    Args:
        sign: part of the map that is used: ``"absolute"``, ``"positive"`` or ``"negative"`` values.
    """

    reference = "Arras et al., Information Fusion 2022, arXiv:2003.07258"
    meaning = "Share of the map that lies in the label; a flat map has the label's share of the volume."

    sign: Sign = "absolute"

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]; a zero map has no mass anywhere: 0."""
        values, label = self._parts(subject)
        total = float(values.sum())
        mass = float(values[label].sum()) / total if total > 0 else 0.0
        return MetricResult(mass, notes={"chance": float(label.double().mean())})


class RelevanceRank(_Localisation):
    """The share of the K strongest voxels that is in the label, K being the label's size (Arras et al. 2022).

    Args:
        sign: part of the map that is used: ``"absolute"``, ``"positive"`` or ``"negative"`` values.
    """

    reference = "Arras et al., Information Fusion 2022, arXiv:2003.07258"
    meaning = "Share of the K strongest voxels that lies in the label of K voxels; chance is the label's share."

    sign: Sign = "absolute"

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]; zeros are never among the strongest voxels: a zero map gets 0."""
        values, label = self._parts(subject)
        return MetricResult(
            share_of_top(values, label, int(label.sum())), notes={"chance": float(label.double().mean())}
        )


class TopKIntersection(_Localisation):
    """The share of the k strongest voxels that is in the label (Theiner et al. 2022).

    Args:
        k: number of voxels, or, below 1, a share of the volume; it should not exceed the label's size.
        sign: part of the map that is used: ``"absolute"``, ``"positive"`` or ``"negative"`` values.
    """

    reference = "Theiner et al., WACV 2022, arXiv:2104.14995"
    meaning = "Share of the strongest k voxels that lies in the label; chance is the label's share of the volume."

    k: float = 0.01
    sign: Sign = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k <= 0:
            raise UsageError(f"TopKIntersection: k={self.k} must be above 0")

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]; where k is greater than the label, at most |label| / k (``best_possible`` in the notes)."""
        values, label = self._parts(subject)
        k = round(self.k) if self.k >= 1 else max(1, round(self.k * len(values)))
        k = min(k, len(values))
        best = min(1.0, int(label.sum()) / k)
        return MetricResult(share_of_top(values, label, k), notes={"k": k, "best_possible": best})


class LocalisationAUC(_Localisation):
    """Area under the ROC curve of the map as a detector of the label's voxels (ties count half).

    Args:
        sign: part of the map that is used: ``"absolute"``, ``"positive"`` or ``"negative"`` values.
    """

    aliases = ("AUC",)
    reference = "Fawcett 2006; as in Hedström et al., JMLR 2023, arXiv:2202.06861"
    meaning = "Chance that a voxel of the label has a stronger value than one outside; 0.5 is chance level."

    sign: Sign = "absolute"

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]; undefined for a zero map, and where the label fills the volume."""
        from scipy.stats import rankdata

        values, label = self._parts(subject)
        if not bool(values.any()):
            return MetricResult.undefined("the map is zero everywhere")
        inside = label.cpu().numpy()
        n, m = int(inside.sum()), int((~inside).sum())
        if m == 0:
            return MetricResult.undefined("the label fills the whole volume")
        ranks = rankdata(values.cpu().numpy())[inside].sum()
        return MetricResult(float((ranks - n * (n + 1) / 2) / (n * m)))


class DistanceProfile(_Localisation):
    """Mean distance of the map from the label, in mm: ``Σ d(v) |a(v)| / Σ |a|`` with d = 0 in the label.

    The notes have the share of the map (``share``) and its mean density against the whole volume's (``density``) in
    each shell: inside, 0-5, 5-10, 10-20 mm, beyond; and, where a body mask is given, the share outside of it.

    Args:
        sign: part of the map that is used: ``"absolute"``, ``"positive"`` or ``"negative"`` values.
    """

    meaning = "Mean distance of the map from the label in mm, weighted by its magnitude; 0 is inside."
    higher_is_better = False
    needs = frozenset({"label", "spacing"})

    sign: Sign = "absolute"

    def measure(self, subject: MetricInput) -> MetricResult:
        """mm; undefined for a zero map."""
        values, _ = self._parts(subject)
        assert subject.label is not None
        assert subject.spacing is not None
        total = float(values.sum())
        if total == 0:
            return MetricResult.undefined("the map is zero everywhere")
        distance = distance_mm(subject.label, subject.spacing).to(values.device).flatten()
        profile = []
        for name, inside in shells(distance.reshape(subject.label.shape), subject.body):
            part, voxels = float(values[inside.flatten()].sum()) / total, int(inside.sum())
            density = part * len(values) / voxels if voxels else None
            profile.append({"shell": name, "voxels": voxels, "share": part, "density": density})
        return MetricResult(float((distance * values).sum() / total), notes={"profile": profile})


def shells(distance: Tensor, body: Tensor | None = None) -> list[tuple[str, Tensor]]:
    """Return names and masks (*spatial), bool, of the distance shells, and of the outside of the body; no overlaps.

    Args:
        distance: from `distance_mm` (*spatial), mm.
        body: bool (*spatial); None: unknown.
    """
    within = torch.ones_like(distance, dtype=torch.bool) if body is None else body.to(distance.device)
    within = within | (distance == 0)  # the label is part of the body
    edges = [*SHELLS_MM, float("inf")]
    masks = [("inside", distance == 0)]
    for low, high in itertools.pairwise(edges):
        name = f"{low:g}-{high:g} mm" if np.isfinite(high) else f"beyond {low:g} mm"
        masks.append((name, (distance > low) & (distance <= high) & within))
    return masks if body is None else [*masks, ("outside the body", ~within)]


def distance_mm(label: Tensor, spacing: object) -> Tensor:
    """Compute each voxel's distance from the nearest voxel of the label (*spatial): (*spatial), mm, float64; 0
    inside."""
    from scipy.ndimage import distance_transform_edt

    distance = distance_transform_edt(~label.cpu().numpy(), sampling=spacing)
    return torch.from_numpy(np.asarray(distance, dtype=np.float64))


def share_of_top(values: Tensor, label: Tensor, k: int) -> float:
    """Return the share of the k greatest values (n,) above zero that is in the label, the expectation over ties."""
    edge = values.topk(k).values[-1]
    above, tied = values > edge, values == edge
    hits = float(label[above].sum())
    if float(edge) > 0:
        hits += float(label[tied].double().mean()) * (k - int(above.sum()))
    return hits / k
