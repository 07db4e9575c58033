"""Randomisation: dependence of the map on the learnt weights, the class and the training labels.

A map that stays the same for a randomised network does not explain the trained one (Adebayo et al. 2018). Control maps
do not depend on the network: their similarity is 1, and a map that reaches it fails.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.model import is_scripted
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.score import WeightedScore
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.metrics.base import Metric, MetricCost, MetricInput, MetricResult, magnitude, mean_interval
from esegeta_monai.metrics.removal import at_least
from esegeta_monai.metrics.robustness import explained
from esegeta_monai.utils.tensors import bounding_box
from esegeta_monai.utils.weights_only import read_weights

__all__ = ["CascadingRandomisation", "DataRandomisation", "IndependentRandomisation", "RandomLogit"]
__all__ += ["execution_order", "randomised", "similarity"]

Similarity = Literal["spearman", "ssim"]
ZERO = "the map is zero everywhere"
ROUNDING = 1e-5


def similarity(a: Tensor, b: Tensor, kind: Similarity = "spearman") -> float:
    """Compute the similarity of the magnitudes of two maps (C, *spatial): 1 for equal maps; 0 if one is flat.

    ``"spearman"``: rank correlation over the voxels where one of them is not zero: voxels outside the target's windows
    are zero in every map and would make all maps of a small target similar. ``"ssim"``: structural similarity (Wang et
    al. 2004) in 2D and 3D in the box of these voxels, windows of 7 voxels (fewer in a smaller box), maps divided by
    their maxima.

    Values below 1e-5 of a map's maximum count as zero, since maps in float32 are exact to that: ranks of rounding
    errors would be random.
    """
    if torch.equal(a, b):
        return 1.0
    x, y = (_above_rounding(magnitude(v)).cpu().numpy() for v in (a, b))
    if x.max() == x.min() or y.max() == y.min():
        return 0.0
    support = torch.from_numpy((x > 0) | (y > 0))
    if kind == "spearman":
        from scipy.stats import spearmanr

        x, y = x[support], y[support]
        return 0.0 if x.max() == x.min() or y.max() == y.min() else float(spearmanr(x, y).statistic)
    from skimage.metrics import structural_similarity

    # windows at the edge of the box may extend beyond it, up to the edge of the volume
    place = tuple(_at_least(b, 7, n) for b, n in zip(bounding_box(support), x.shape))
    x, y = x[place], y[place]
    side = min(7, *x.shape)
    return float(structural_similarity(x / x.max(), y / y.max(), win_size=side - 1 + side % 2, data_range=1.0))


def _above_rounding(strength: Tensor) -> Tensor:
    return torch.where(strength > ROUNDING * strength.max(), strength, 0.0)


def _at_least(part: slice, side: int, length: int) -> slice:
    """Extend a slice to a length of ``side`` if the axis is long enough."""
    start = max(0, min(part.start, length - side))
    return slice(start, max(part.stop, min(start + side, length)))


def execution_order(objective: Objective) -> list[str]:
    """Return names of modules that own parameters, in the order in which they are last called on a window.

    Raises:
        MetricError: a TorchScript network, whose calls cannot be observed.
    """
    network = objective.model.network
    if is_scripted(network):
        raise MetricError("a TorchScript network cannot be randomised layer by layer: load the plain PyTorch network")
    own = {n: m for n, m in network.named_modules() if any(True for _ in m.parameters(recurse=False))}
    called: list[str] = []
    handles = [
        # "before" for containers that own a parameter: what they contain is called later
        module.register_forward_hook(lambda m, i, o, name=name: called.append(name))
        for name, module in own.items()
    ]
    try:
        with torch.no_grad():
            window = objective.windows[len(objective.windows) // 2]
            objective.run(objective.window(window), [window])
    finally:
        for handle in handles:
            handle.remove()
    last = {name: i for i, name in enumerate(called)}
    return sorted(last, key=lambda name: last[name])


@contextmanager
def randomised(network: nn.Module, layers: Sequence[str], seed: int) -> Iterator[None]:
    """Re-initialise layers; afterwards restore every parameter and buffer bit for bit, also after an exception.

    A layer's own ``reset_parameters`` draws its new values; parameters without one (tokens, position embeddings) are
    drawn from a normal distribution with the mean and standard deviation of the learnt values.
    """
    tensors = {id(t): t for t in [*network.parameters(), *network.buffers()]}
    before = [(t, t.detach().clone()) for t in tensors.values()]
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name in layers:
                _reset(network.get_submodule(name))
        yield
    finally:
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        torch.set_rng_state(state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _reset(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        spread = float(parameter.std()) if parameter.numel() > 1 else float(parameter.abs().max())
        parameter.copy_(torch.randn_like(parameter) * spread + float(parameter.mean()))


class _Randomised(Metric):
    """Base class: randomises layers in stages from the output to the input and compares the maps of each stage."""

    group = "randomisation"
    reference = "Adebayo et al., NeurIPS 2018, arXiv:1810.03292"
    higher_is_better = False
    needs = frozenset({"objective", "method"})

    stages: int = 6
    n_samples: int = 2
    similarity: Similarity = "spearman"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "stages", self.stages, 1)
        at_least(self, "n_samples", self.n_samples, 1)
        _check(self.similarity)

    def cost(self, objective: Objective) -> MetricCost:
        """One explanation per stage and sample, and one of the image itself."""
        return MetricCost(explanations=self.stages * self.n_samples + 1)

    def _stages(self, subject: MetricInput, cascading: bool) -> MetricResult:
        objective = subject.need_objective()
        key = ("randomised", cascading, id(subject.method), self.stages, self.n_samples, self.similarity)
        layers, similarities, zero = subject.once(key, lambda: self._compare(subject, objective, cascading))
        if zero[subject.target]:
            return MetricResult.undefined(ZERO)
        values = similarities[subject.target]  # (n_samples, stages)
        low, high = mean_interval(values.mean(1))
        share = [i / len(layers) for i in range(1, len(layers) + 1)]
        first = [0.0] if cascading else []
        curve = {"x": [*first, *share], "y": [*(1.0 for _ in first), *values.mean(0).tolist()]}
        notes = {"stages": [{"layers": part} for part in layers], "last": float(values[:, -1].mean())}
        return MetricResult(float(values.mean()), low, high, len(values), curve=curve, notes=notes)

    def _compare(
        self, subject: MetricInput, objective: Objective, cascading: bool
    ) -> tuple[list[list[str]], np.ndarray, list[bool]]:
        """Return layers of each stage, similarities (k, n_samples, stages), and per target if its map is zero."""
        base = subject.once(("explained", id(subject.method)), lambda: explained(subject, objective))
        order = execution_order(objective)[::-1]
        if not order:
            raise MetricError("the network has no layer with parameters, so nothing can be randomised")
        parts = [p.tolist() for p in np.array_split(np.array(order), min(self.stages, len(order)))]
        similarities = np.zeros((objective.n_targets, self.n_samples, len(parts)))
        for sample in range(self.n_samples):
            for stage, part in enumerate(parts):
                layers = [name for p in parts[: stage + 1] for name in p] if cascading else part
                similarities[:, sample, stage] = self._likeness(subject, base, layers, sample)
        return parts, similarities, [not bool(b.any()) for b in base]

    def _likeness(self, subject: MetricInput, base: Tensor, layers: Sequence[str], sample: int) -> list[float]:
        """Return per target the similarity of its map to that with these layers random; cached, for both orders."""
        objective = subject.need_objective()

        def measured() -> list[float]:
            with randomised(objective.model.network, layers, objective.seed + 1 + sample):
                maps = explained(subject, objective.derive(image=objective.image))
            return [similarity(a, b, self.similarity) for a, b in zip(base, maps)]

        return subject.once(("likeness", id(subject.method), tuple(layers), sample, self.similarity), measured)


def _check(kind: str) -> None:
    if kind not in ("spearman", "ssim"):
        raise UsageError(f"similarity={kind!r}: give 'spearman' or 'ssim'")


class CascadingRandomisation(_Randomised):
    """Layers re-initialised one after the other from the output to the input, each stage on top of the one before; the
    mean similarity of the maps to the true one over the stages (Adebayo et al. 2018).

    Args:
        stages: greatest number of stages; layers are grouped evenly, in execution order.
        n_samples: number of re-initialisations with different seeds, for the interval.
        similarity: ``"spearman"`` or ``"ssim"`` of the magnitudes.
    """

    meaning = "Mean similarity of the map to those of the same network with more and more random weights; 1: it fails."

    def measure(self, subject: MetricInput) -> MetricResult:
        """[-1, 1]; the curve's x is the share of stages that are random."""
        return self._stages(subject, cascading=True)


class IndependentRandomisation(_Randomised):
    """Each stage of layers re-initialised alone, all others as learnt (Adebayo et al. 2018).

    Args:
        stages, n_samples, similarity: see `CascadingRandomisation`.
    """

    meaning = "Mean similarity of the map to those of the same network with one stage of layers random; 1: it fails."

    def measure(self, subject: MetricInput) -> MetricResult:
        """[-1, 1]; the curve's x is the stage, from the output to the input."""
        return self._stages(subject, cascading=False)


class RandomLogit(Metric):
    """Similarity of the map to that of other classes under the same mask (Sixt et al. 2020).

    Args:
        n_samples: number of other classes, drawn at random; all if there are no more.
        similarity: ``"spearman"`` or ``"ssim"`` of the magnitudes.
    """

    group = "randomisation"
    reference = "Sixt et al., ICML 2020, arXiv:1912.09818"
    meaning = "Mean similarity of the map to those of other classes; 1: it does not depend on the class."
    higher_is_better = False
    needs = frozenset({"objective", "method"})

    n_samples: int = 3
    similarity: Similarity = "spearman"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "n_samples", self.n_samples, 1)
        _check(self.similarity)

    def cost(self, objective: Objective) -> MetricCost:
        """One explanation for all other classes of a target, and one of the image itself."""
        return MetricCost(explanations=len(objective.scores) + 1)

    def measure(self, subject: MetricInput) -> MetricResult:
        """[-1, 1]; undefined for a zero map. Raises where there is no other class."""
        objective, alone = subject.need_objective(), subject.alone
        score, n = objective.scores[subject.target], objective.n_classes
        if not isinstance(score, WeightedScore) or score.class_index is None or n < 2:
            raise MetricError(f"{score.label} has no other class beside it, so RandomLogit has nothing to compare with")
        others = [c for c in range(n) if c != score.class_index]
        chosen = np.random.default_rng(objective.seed).permutation(others)[: self.n_samples].tolist()
        base = subject.once(("explained", id(subject.method)), lambda: explained(subject, objective))[subject.target]
        if not bool(base.any()):
            return MetricResult.undefined(ZERO)
        maps = explained(subject, alone.derive(scores=[score.altered(n, class_index=c) for c in chosen]))
        similarities = [similarity(base, m, self.similarity) for m in maps]
        low, high = mean_interval(similarities)
        return MetricResult(float(np.mean(similarities)), low, high, len(similarities), notes={"classes": chosen})


class DataRandomisation(Metric):
    """Similarity of the map to that of the same network trained on random labels (Adebayo et al. 2018).

    Args:
        network: the second network: a module, or a file with its state dict (for the architecture at hand).
        similarity: ``"spearman"`` or ``"ssim"`` of the magnitudes.

    Raises:
        MetricError: no network.
        UsageError: a file that is no state dict, or weights that do not fit.
    """

    group = "randomisation"
    reference = "Adebayo et al., NeurIPS 2018, arXiv:1810.03292"
    meaning = "Similarity of the map to that of a network trained on random labels; 1: it ignores the learnt labels."
    higher_is_better = False
    needs = frozenset({"objective", "method"})

    network: Any = None
    similarity: Similarity = "spearman"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.similarity)

    @property
    def parameters(self) -> dict[str, Any]:
        named = type(self.network).__name__ if isinstance(self.network, nn.Module) else self.network
        return {"network": None if named is None else Path(str(named)).name, "similarity": self.similarity}

    def validate(self, subject: MetricInput) -> None:
        super().validate(subject)
        if self.network is None:
            raise MetricError("DataRandomisation needs a second network, trained on random labels: network=FILE")

    def cost(self, objective: Objective) -> MetricCost:
        """One explanation of the second network for each target, and one of the image itself."""
        return MetricCost(explanations=len(objective.scores) + 1)

    def measure(self, subject: MetricInput) -> MetricResult:
        """[-1, 1]; undefined for a zero map."""
        objective = subject.need_objective()
        base = subject.once(("explained", id(subject.method)), lambda: explained(subject, objective))
        if not bool(base[subject.target].any()):
            return MetricResult.undefined(ZERO)
        with exchanged(objective.model.network, self._second(objective.model.network)):
            maps = explained(subject, objective.derive(image=objective.image))
        return MetricResult(similarity(base[subject.target], maps[subject.target], self.similarity))

    def _second(self, network: nn.Module) -> dict[str, Tensor]:
        if isinstance(self.network, nn.Module):
            return dict(self.network.state_dict())
        try:
            state = read_weights(self.network)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            what = error.strerror if isinstance(error, OSError) else type(error).__name__
            raise UsageError(
                f"DataRandomisation: {Path(self.network).name} cannot be read as a state dict ({what}): save one with "
                "torch.save(network.state_dict(), FILE)"
            ) from error
        return dict(state.get("state_dict", state) if isinstance(state, dict) else {})


@contextmanager
def exchanged(network: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    """Load other weights, tensors of the same shapes; afterwards restore all, also after an exception."""
    with randomised(network, [], 0):
        try:
            network.load_state_dict(copy.copy(state))
        except RuntimeError as error:
            raise UsageError(
                f"the second network's weights do not fit: {' '.join(str(error).split())[:300]}"
            ) from error
        yield
