"""DeepLIFT: differences from a reference, passed back by finite-difference multipliers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.baselines import Baseline, baseline_for, choice_passes, describe_baseline
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.network.hooks import find_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method, completeness, gaps
from esegeta_monai.methods.layer.activation import LayerMethod
from esegeta_monai.methods.layer.scattered import LayerSum
from esegeta_monai.utils.distributed import Summed

__all__ = ["DeepLift", "DeepLiftShap", "LayerDeepLift", "LayerDeepLiftShap"]


class DeepLift(Method):
    """``a = (x − x₀) · m`` with m the finite-difference multipliers, the rescale rule (Shrikumar et al. 2017).

    Complete to rounding on every network: the sum of the map is ``F(x) − F(x₀)``. Activations, norms, attention and
    pooling have exact difference formulas, see `esegeta_monai.engine.rules.deep_lift`; a non-linear target contributes
    its own multiplier over the two predictions.

    Args:
        baseline: x₀, see `esegeta_monai.engine.baselines`.

    Example:
        >>> DeepLift(baseline="blur(sigma=4)").full_precision
        True
    """

    map_check = "differences"
    reference = "Shrikumar et al., ICML 2017, arXiv:1704.02685"
    produces = "input map"
    additive = True
    units = "target per voxel"
    reads_image_value = True
    full_precision = True
    repeats_in_float64 = True
    gap_bound = 1e-3

    baseline: Any = "auto"

    def passes(self, objective: Objective) -> int:
        """Count image and baseline once (twice for non-linear targets, which need F at the baseline first), and a plain
        pass of the first window, whose output is compared with that under the rules."""
        return passes_against(objective) + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        maps, _, notes = _mean(objective, self.baseline, 1)
        return Explained(maps, notes)


class DeepLiftShap(Method):
    """The mean of `DeepLift` over references drawn from a distribution (Lundberg & Lee 2017): an approximation of
    Shapley values, complete to rounding for the references that were drawn.

    Args:
        baseline: the distribution, see `esegeta_monai.engine.baselines`; a list of files or tensors is used one
            by one.
        n_samples: number of draws; a list that is not longer is used completely.
    """

    map_check = "mean of differences"
    reference = "Lundberg & Lee, NeurIPS 2017, arXiv:1705.07874"
    produces = "input map"
    additive = True
    units = "target per voxel"
    reads_image_value = True
    full_precision = True
    repeats_in_float64 = True
    gap_bound = 1e-3

    baseline: Any = "auto"
    n_samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_samples(self.n_samples)

    def passes(self, objective: Objective) -> int:
        """Those of `DeepLift` per draw."""
        return self.n_samples * passes_against(objective) + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        maps, count, notes = _mean(objective, self.baseline, self.n_samples)
        return Explained(maps, {**notes, "n_baselines": count})


class LayerDeepLift(LayerMethod):
    """`DeepLift` at a layer: ``(A − A₀) · m`` with A₀ the layer's output for the reference.

    The sum is the part of ``F(x) − F(x₀)`` that flows through the layer (``share_through_layer`` in the record); all of
    it if no path bypasses the layer. ``completeness_gap`` is that of the relevance that reaches the image in the same
    passes.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
    """

    reference = "Shrikumar et al., ICML 2017, arXiv:1704.02685"
    additive = True
    units = "target per voxel"
    reads_image_value = True
    full_precision = True
    repeats_in_float64 = True
    gap_bound = 1e-3

    baseline: Any = "auto"

    @property
    def references(self) -> int:
        """Number of references that are drawn."""
        return 1

    def passes(self, objective: Objective) -> int:
        """Those of `DeepLift` per draw."""
        return self.references * passes_against(objective) + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        module = find_layer(objective.model.network, layer)
        baseline = baseline_for(self.baseline)
        total, starts = LayerSum(objective, layer, self.reduce), []
        reached = torch.zeros(2, objective.n_targets, dtype=torch.float64)  # at the image: sum, and of absolute values

        def see(batch: Batch, relevance: rules.Relevance) -> None:
            total.add(batch, relevance.layers[layer].relevance)
            reached.add_(_sums(relevance.input))

        for x0 in draws(baseline, objective, self.references):
            starts.append(against(objective, x0, see, [total, reached], {layer: module}))
        total.scale(1 / len(starts))
        reached /= len(starts)
        maps, padding = total.result()
        mean = torch.stack(starts).mean(0).cpu()
        notes: dict[str, Any] = {"layer": layer, "sum_in_padding": padding, **describe_baseline(baseline, mean)}
        notes |= gaps(reached[0], reached[1], objective.image_values().cpu() - mean)
        if self.reduce == "sum":
            notes["share_through_layer"] = total.share(objective.image_values().cpu() - mean)
        return Explained(maps, notes)


class LayerDeepLiftShap(LayerDeepLift):
    """The mean of `LayerDeepLift` over references drawn from a distribution.

    Args:
        layer, reduce: see `LayerDeepLift`.
        baseline: the distribution; a list of files or tensors is used one by one.
        n_samples: number of draws; a list that is not longer is used completely.
    """

    reference = "Lundberg & Lee, NeurIPS 2017, arXiv:1705.07874"
    reads_image_value = True

    n_samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_samples(self.n_samples)

    @property
    def references(self) -> int:
        return self.n_samples


See = Callable[[Batch, rules.Relevance], None]


def against(
    objective: Objective,
    x0: Tensor,
    see: See,
    sums: Sequence[Tensor | Summed],
    layers: Mapping[str, torch.nn.Module] | None = None,
) -> Tensor:
    """Run DeepLIFT against one reference, window by window.

    Args:
        x0: the reference (C, *spatial).
        see: called with the relevance of each batch.
        sums: tensors that ``see`` adds to, see `Objective.each`.
        layers: modules whose outputs are attributed as well.

    Returns:
        F at the reference (k,), float64; for linear scores from DeepLIFT's own pass over the reference.
    """
    start, cotangents = (None, None) if objective.linear else differences(objective, x0)
    at_reference = torch.zeros(objective.n_targets, dtype=torch.float64)

    def run(batch: Batch) -> None:
        image, reference = batch.image, batch.cut(x0)
        relevance = rules.deep_lift(
            batch.forward, image, reference, batch.stacked_cotangents(), layers=layers, compare=batch.compare
        )
        if start is None:
            assert relevance.at_baseline is not None
            at_reference.add_(batch.scores(relevance.at_baseline).sum(1).cpu())
        see(batch, relevance)

    objective.each([(0, w) for w in objective.windows], run, cotangents=cotangents, sums=[*sums, at_reference])
    return (at_reference + objective.constants()).to(objective.image.device) if start is None else start


def passes_against(objective: Objective) -> int:
    """Return the number of window passes of `against`."""
    return (2 if objective.linear else 3) * len(objective.windows) + 1


def _sums(relevance: Tensor) -> Tensor:
    """Return the sums of relevance (k, …) and of its absolute values: (2, k), float64."""
    flat = relevance.flatten(1)
    return torch.stack([flat.sum(1, dtype=torch.float64), flat.abs().sum(1, dtype=torch.float64)]).cpu()


def _mean(objective: Objective, choice: Any, n: int) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the mean map over n draws of a baseline (k, C, *spatial), the number of draws, and notes."""
    baseline = baseline_for(choice)
    maps, starts = objective.new_maps(), []

    def see(batch: Batch, relevance: rules.Relevance) -> None:
        objective.add(maps, batch, relevance.input)

    for x0 in draws(baseline, objective, n):
        starts.append(against(objective, x0, see, [maps]))
    maps /= len(starts)
    start = torch.stack(starts).mean(0)
    sums = completeness(maps, objective.image_values() - start)
    return maps, len(starts), {**sums, **describe_baseline(baseline, start)}


def differences(objective: Objective, x0: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Return F at a reference (k,), and per score its multiplier m (channels, *box) of differences of the prediction:
    ``∂s/∂P`` for a linear score, else such that ``Σ m · (P − P₀) = s(P) − s(P₀)``."""
    at_reference = [p[0] for p in objective.predict(x0[None])]
    start = torch.stack([s.value(p.double()) for s, p in zip(objective.scores, at_reference)])
    cotangents = []
    for score, p, p0 in zip(objective.scores, objective.image_predictions(), at_reference):
        if score.linear:
            cotangents.append(score.cotangent(p))
        else:
            cotangents.append(rules.deep_lift_multiplier(score.value, p.double(), p0.double()).to(p.dtype))
    return start, cotangents


def draws(baseline: Baseline, objective: Objective, n: int) -> Iterator[Tensor]:
    """Yield n references (C, *spatial), or all of a list that is not longer."""
    files = getattr(baseline, "files", None)
    if files is not None and 0 < len(files) <= n:
        for file in files:
            yield baseline_for([file]).draw(objective, objective.generator())
        return
    generator = objective.generator()
    for _ in range(n):
        yield baseline.draw(objective, generator)


def _check_samples(n: int) -> None:
    if n < 1:
        raise UsageError(f"n_samples={n}: at least one is needed")
