"""Faithfulness: agreement of the map with the target's change when parts of the image are removed.

Scores ``F(x')`` of perturbed images come from `esegeta_monai.engine.perturbation.scoring.score_changes`, so that only
changed windows are computed, for classification and segmentation. Differences are in units of ``|F(x) − F(x₀)|``, the
change of the target when the whole image is replaced, so that logits, probabilities and sums over voxels are
comparable.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np

from esegeta_monai.engine.baselines import baseline_for, noise_like
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Added, Perturbations
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import known_score_changes
from esegeta_monai.engine.windows.plan import last_axes
from esegeta_monai.errors import UsageError
from esegeta_monai.metrics.base import Metric, MetricCost, MetricInput, MetricResult, Need, bootstrap, mean_interval
from esegeta_monai.metrics.removal import Removal, at_least, blind, check_parts, drawn_removals, is_random, removal_of
from esegeta_monai.utils.registry import json_ready

__all__ = ["IROF", "Deletion", "FaithfulnessCorrelation", "Infidelity", "Insertion", "RegionPerturbation"]
__all__ += ["SensitivityN"]

NOTHING = "the target does not change when the whole image is replaced by the baseline: choose another baseline"
ZERO = "the map is zero everywhere"
NEEDS: frozenset[Need] = frozenset({"objective"})


_Drawn = tuple[float, np.ndarray, np.ndarray, dict[str, Any]]
"""The result of one draw: the area, x and y of the curve, and notes."""


class _CurveMetric(Metric):
    """Base class: a number per removal curve, averaged over the draws of the baseline.

    Subclasses have the parameters ``features``, ``steps``, ``baseline`` and ``n_samples``, each in its own order.
    """

    group = "faithfulness"
    needs = NEEDS
    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        own: Any = self
        check_parts(own.features, own.baseline)
        at_least(self, "steps", own.steps, self.least_steps)
        at_least(self, "n_samples", own.n_samples, 1)

    def cost(self, objective: Objective) -> MetricCost:
        """One prediction per step and draw. Maps with equal values are drawn more often and cost more."""
        own: Any = self
        return MetricCost(each=(own.steps + 1) * (own.n_samples if is_random(own.baseline) else 1))

    @abstractmethod
    def curve(self, removal: Removal) -> _Drawn:
        """Compute the curve of one draw."""

    def measure(self, subject: MetricInput) -> MetricResult:
        """About 0 to 1 (below or above where the target overshoots); undefined where nothing can be removed."""
        if not bool(subject.map.any()):
            return MetricResult.undefined(ZERO)
        own: Any = self
        areas, curves = [], []
        for removal in drawn_removals(subject, own.features, own.baseline, own.n_samples):
            if blind(subject, removal.full):
                return MetricResult.undefined(NOTHING)
            area, x, y, notes = self.curve(removal)
            areas.append(area)
            curves.append(y)
        mean = {"x": x.tolist(), "y": np.mean(curves, 0).tolist()}
        return MetricResult(float(np.mean(areas)), *mean_interval(areas), len(areas), curve=mean, notes=notes)


class _Area(_CurveMetric):
    """Area under the target's curve while features are removed (or inserted) in the order of the map."""

    reference = "Petsiuk et al., BMVC 2018, arXiv:1806.07421"
    least_steps = 2
    insert: ClassVar[bool]

    features: Any = "blocks"
    steps: int = 20
    baseline: Any = "auto"
    n_samples: int = 3

    def curve(self, removal: Removal) -> _Drawn:
        x, y = removal_curve(removal, self.steps, self.insert)
        notes = {"features": len(removal.features), "features_seen": len(removal.seen), "steps": len(x) - 1}
        return float(np.trapezoid(y, x)), x, y, notes


class Deletion(_Area):
    """The area under ``y(t) = (F(x_t) − F(x₀)) / |F(x) − F(x₀)|``, the share t of features removed in the map's order
    (Petsiuk et al. 2018), strongest first.

    Args:
        features: the parts that are removed together: ``"blocks"`` (16 per axis in 2D, 8 in 3D), ``"grid(size=8)"``,
            ``"supervoxels(n_segments=100)"``, a label map.
        steps: number of steps of the curve.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
        n_samples: number of draws if the baseline is random, or if the map has equal means over several features, which
            are then removed in a random order. The value is the mean and the interval is over draws; otherwise one
            curve is enough.
    """

    meaning = "Area under the target's curve while the strongest parts are removed; low: they carry the target."
    higher_is_better = False
    insert = False


class Insertion(_Area):
    """The area under ``y(t)`` of `Deletion`, features inserted into the baseline, strongest first.

    Args:
        features, steps, baseline, n_samples: see `Deletion`. The paper inserts into a blurred image
            (``baseline="blur(sigma=4)"``).
    """

    meaning = "Area under the target's curve while the strongest parts are inserted; high: they suffice."
    higher_is_better = True
    insert = True


def removal_curve(removal: Removal, steps: int, insert: bool) -> tuple[np.ndarray, np.ndarray]:
    """Compute a removal (insertion) curve.

    Features outside all windows of the target are left out: they change nothing.

    Returns:
        x (n,), the share of features removed (inserted), in [0, 1]; y (n,), ``(F(x_t) − F(x₀)) / |F(x) − F(x₀)|``.
    """
    order = removal.order
    counts = np.unique(np.round(np.linspace(0, len(order), min(steps, len(order)) + 1)).astype(int))
    coalitions = np.ones((len(counts), len(removal.features)), dtype=bool)
    for row, count in zip(coalitions, counts):
        row[order[count:] if insert else order[:count]] = False
    full = removal.full
    y = (removal.own(coalitions) - full) / abs(full)
    return counts / len(order), y


class IROF(_CurveMetric):
    """Iterative removal of features: ``1/L Σ_l (F(x) − F(x_l)) / |F(x) − F(x₀)|``, supervoxels replaced by their mean
    in the order of the map's mean over them (Rieger & Hansen 2020).

    The paper divides by F(x), a probability; for logits and sums over voxels the range is needed instead.

    Args:
        features: the parts, see `Deletion`.
        baseline: replaces them.
        steps: greatest L.
        n_samples: see `Deletion`.
    """

    reference = "Rieger & Hansen 2020, arXiv:2003.08747"
    meaning = "Area over the target's curve while supervoxels are removed, strongest first; high: they carry it."
    higher_is_better = True

    features: Any = "supervoxels(n_segments=60)"
    baseline: Any = "feature mean"
    steps: int = 60
    n_samples: int = 3

    def curve(self, removal: Removal) -> _Drawn:
        x, y = removal_curve(removal, self.steps, insert=False)
        return float((y[0] - y[1:]).mean()), x, y, {"steps": len(x) - 1}


class RegionPerturbation(_CurveMetric):
    """Area over the most-relevant-first perturbation curve, ``AOPC = 1/(L+1) Σ_{l=0..L} (F(x) − F(x_l))``, in units of
    ``|F(x) − F(x₀)|``: blocks replaced one by one by random values (Samek et al. 2017).

    Args:
        steps: L, the number of blocks replaced.
        features: the blocks, see `Deletion`.
        baseline: replaces them; the paper draws uniform noise.
        n_samples: draws of the noise, and of the order of blocks with equal means of the map.
    """

    reference = "Samek et al., IEEE TNNLS 2017, arXiv:1509.06321"
    meaning = "Mean loss of the target while the strongest regions are replaced by noise; high: they carry it."
    higher_is_better = True

    steps: int = 20
    features: Any = "blocks"
    baseline: Any = "uniform"
    n_samples: int = 3

    def curve(self, removal: Removal) -> _Drawn:
        count = min(self.steps, len(removal.order))
        coalitions = np.ones((count + 1, len(removal.features)), dtype=bool)
        for step in range(1, count + 1):
            coalitions[step, removal.order[:step]] = False
        lost = -removal.own(coalitions) / abs(removal.full)
        return float(lost.mean()), np.arange(len(lost)), lost, {}


class FaithfulnessCorrelation(Metric):
    """Pearson's correlation, over random sets S of features, between ``Σ_S a`` and ``F(x) − F(x with S replaced)``
    (Bhatt et al. 2020).

    Args:
        n_samples: number of sets.
        subset: size of each set, as a share of the features that the target sees.
        features, baseline: see `Deletion`.
    """

    group = "faithfulness"
    reference = "Bhatt et al., IJCAI 2020, arXiv:2005.00631"
    meaning = "Correlation between the map's sums over random parts and the target's loss without these parts."
    higher_is_better = True
    needs = NEEDS

    n_samples: int = 30
    subset: float = 0.25
    features: Any = "blocks"
    baseline: Any = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self.features, self.baseline)
        at_least(self, "n_samples", self.n_samples, 10)
        if not 0 < self.subset < 1:
            raise UsageError(f"FaithfulnessCorrelation: subset={self.subset} is a share between 0 and 1")

    def cost(self, objective: Objective) -> MetricCost:
        """One prediction per set."""
        return MetricCost(shared=self.n_samples)

    def measure(self, subject: MetricInput) -> MetricResult:
        """[-1, 1]; undefined where the map's sum is the same for all sets (a zero map)."""
        removal = removal_of(subject, self.features, self.baseline)
        size = max(1, round(self.subset * len(removal.seen)))
        foreseen, lost = foreseen_and_lost(removal, size, self.n_samples, subject.need_objective().seed)
        value = correlation(foreseen[None], lost[None])[0]
        if not math.isfinite(value):
            return MetricResult.undefined("the map gives the same to all sets, or the target reacts to none")
        low, high = bootstrap(correlation, foreseen, lost)
        return MetricResult(float(value), low, high, len(foreseen), notes={"subset_size": size})


class SensitivityN(Metric):
    """`FaithfulnessCorrelation` for sets of n features, n from one to most of them; mean over n (Ancona et al. 2018).

    Args:
        sizes: number of values of n, spaced evenly on a logarithmic scale.
        n_samples: sets per n.
        features, baseline: see `Deletion`.
    """

    group = "faithfulness"
    reference = "Ancona et al., ICLR 2018, arXiv:1711.06104"
    meaning = "Mean correlation between map and loss of the target over sets of growing size."
    higher_is_better = True
    needs = NEEDS

    sizes: int = 4
    n_samples: int = 12
    features: Any = "blocks"
    baseline: Any = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self.features, self.baseline)
        at_least(self, "n_samples", self.n_samples, 10)
        at_least(self, "sizes", self.sizes, 1)

    def cost(self, objective: Objective) -> MetricCost:
        """One prediction per set."""
        return MetricCost(shared=self.sizes * self.n_samples)

    def measure(self, subject: MetricInput) -> MetricResult:
        """[-1, 1]; undefined for a zero map. The interval is over n."""
        removal = removal_of(subject, self.features, self.baseline)
        sizes = np.unique(np.round(np.geomspace(1, max(1, 0.8 * len(removal.seen)), self.sizes)).astype(int))
        correlations = []
        for size in sizes.tolist():
            seed = subject.need_objective().seed + size
            foreseen, lost = foreseen_and_lost(removal, size, self.n_samples, seed)
            correlations.append(float(correlation(foreseen[None], lost[None])[0]))
        known = [(s, c) for s, c in zip(sizes.tolist(), correlations) if math.isfinite(c)]
        if not known:
            return MetricResult.undefined("the map gives the same to all sets, or the target reacts to none")
        values = [c for _, c in known]
        low, high = mean_interval(values)
        curve = {"x": [float(s) for s, _ in known], "y": values}
        return MetricResult(float(np.mean(values)), low, high, len(values), curve=curve)


def foreseen_and_lost(removal: Removal, size: int, n_samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``Σ_S a`` and ``F(x) − F(x without S)``, (n_samples,) each, for random sets S of ``size`` features.

    The sets are the same for all maps of a target.
    """
    generator = np.random.default_rng(seed)
    coalitions = np.ones((n_samples, len(removal.features)), dtype=bool)
    for row in coalitions:
        row[generator.choice(removal.seen, size, replace=False)] = False
    return ~coalitions @ removal.shares.numpy(), -removal.common(coalitions)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute Pearson's correlation of rows (r, n): (r,), NaN where a row is constant."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    flat = scale <= 1e-12 * max(float(np.abs(a).max() * np.abs(b).max() * a.shape[1]), np.finfo(float).tiny)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(flat, np.nan, (a * b).sum(1) / np.where(flat, 1, scale))


class Infidelity(Metric):
    """``min_β E[(β Iᵀa − ΔF)²] / E[ΔF²]`` with ``ΔF = F(x) − F(x − I)`` (Yeh et al. 2019, normalised by the best scale
    β as there).

    Divided by ``E[ΔF²]``, a zero map gets 1, the worst; the notes have the paper's numerator (``infidelity``), β
    (``scale``), and the ends of the ``boxes`` in voxels, per axis.

    Args:
        perturbation: ``"boxes"``: a random box within the target's windows is replaced by the baseline;
            ``"noise"``: Gaussian noise on the whole volume, I = ε, with the prediction ``Σ a · ε``: for gradients.
        n_samples: at least 10.
        size: side of the box in voxels; None: half a window.
        multiplied: for boxes. True if the map is a share of F, already multiplied by the input (integrated gradients,
            LRP, occlusion, SHAP), which predicts ``Σ_box a``. False, for gradients: ``Σ_box a · (x − x₀)``, as in the
            paper.
        baseline: x₀ in the box.
        std: standard deviation of the noise, in units of each channel's standard deviation.
        keep_sign: True requires β ≥ 0, so that a map of the wrong sign explains nothing. The paper permits negative β:
            a map is then as good as its negative.
    """

    group = "faithfulness"
    reference = "Yeh et al., NeurIPS 2019, arXiv:1901.09392"
    meaning = "Share of the target's response to random changes that the map does not predict; 1: as good as no map."
    higher_is_better = False
    needs = NEEDS

    perturbation: Literal["boxes", "noise"] = "boxes"
    n_samples: int = 30
    size: int | None = None
    multiplied: bool = True
    baseline: Any = "auto"
    std: float = 0.1
    keep_sign: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        baseline_for(self.baseline, local=True)
        at_least(self, "n_samples", self.n_samples, 10)
        if self.perturbation not in ("boxes", "noise"):
            raise UsageError(f"Infidelity: perturbation={self.perturbation!r}: give 'boxes' or 'noise'")
        at_least(self, "size", 1 if self.size is None else self.size, 1)
        if self.std <= 0:
            raise UsageError(f"Infidelity: std={self.std} must be above 0")

    def cost(self, objective: Objective) -> MetricCost:
        """One prediction per box or noisy image; a box changes only some of the windows."""
        return MetricCost(shared=self.n_samples)

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]."""
        foreseen, lost, drawn = self._noise(subject) if self.perturbation == "noise" else self._boxes(subject)
        if not np.any(lost):
            return MetricResult.undefined(
                "the target reacts to none of the perturbations: use larger boxes, or more noise"
            )
        value, beta = (float(v[0]) for v in self._relative(foreseen[None], lost[None]))
        low, high = bootstrap(lambda s, d: self._relative(s, d)[0], foreseen, lost)
        notes: dict[str, Any] = {"infidelity": float(np.mean((beta * foreseen - lost) ** 2)), "scale": beta}
        notes |= {"without_scale": float(np.mean((foreseen - lost) ** 2)), **drawn}
        return MetricResult(value, low, high, len(foreseen), notes=notes)

    def _relative(self, foreseen: np.ndarray, lost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the value and β, (r,) each, of rows (r, n)."""
        square, energy = (foreseen * foreseen).sum(1), (lost * lost).sum(1)
        beta = np.divide((foreseen * lost).sum(1), square, out=np.zeros_like(square), where=square > 0)
        if self.keep_sign:
            beta = np.maximum(beta, 0)
        missed = ((beta[:, None] * foreseen - lost) ** 2).sum(1)
        return np.divide(missed, energy, out=np.full_like(energy, np.nan), where=energy > 0), beta

    def _boxes(self, subject: MetricInput) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        objective, alone = subject.need_objective(), subject.alone
        key = ("reference", "whole", repr(json_ready(self.baseline)))
        reference = subject.once(
            key, lambda: baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        )
        places = [alone.plan.place(w) for w in alone.windows]
        generator = np.random.default_rng(objective.seed)
        starts, stops = [], []
        low = [min(p[axis].start for p in places) for axis in range(len(places[0]))]
        high = [max(p[axis].stop for p in places) for axis in range(len(places[0]))]
        for _ in range(self.n_samples):
            sides = [max(1, r // 2) if self.size is None else self.size for r in alone.plan.roi]
            sides = [min(b - a, s) for a, b, s in zip(low, high, sides)]
            start = [int(generator.integers(a, b - s + 1)) for a, b, s in zip(low, high, sides)]
            starts.append(start)
            stops.append([a + s for a, s in zip(start, sides)])
        boxes = Boxes(starts, stops, reference)
        values = subject.per_channel
        if not self.multiplied:
            values = values * (objective.image - reference).to(values)
        foreseen = [float(values[last_axes(box)].sum()) for box in boxes.boxes]
        drawn = [[list(ends) for ends in zip(a, b)] for a, b in zip(starts, stops)]
        return np.array(foreseen), _lost(subject, boxes), {"boxes": drawn}

    def _noise(self, subject: MetricInput) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        objective = subject.need_objective()
        generator = objective.generator()
        foreseen, lost = [], []
        for _ in range(self.n_samples):  # one volume of noise at a time; the same ones for every map
            noise = noise_like(objective.image, self.std, generator)
            foreseen.append(float((subject.per_channel * noise.to(subject.map.device)).sum()))
            lost.append(_lost(subject, Added(-noise[None])))
        return np.array(foreseen), np.concatenate(lost), {}


def _lost(subject: MetricInput, perturbations: Perturbations) -> np.ndarray:
    """Return ``F(x) − F(x')`` of the subject's target (n,), reusing scores computed for other maps."""
    return -known_score_changes(subject.need_objective(), perturbations)[subject.target].numpy()
