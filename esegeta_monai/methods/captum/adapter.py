"""Algorithms of Captum on whole volumes, through the windows, targets and baselines of this package."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.baselines import baseline_for, describe_baseline
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.feature_masks import features_for
from esegeta_monai.engine.network.model import out_of_memory
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import EsegetaError, MethodError, UsageError
from esegeta_monai.methods.base import Explained, Method, completeness
from esegeta_monai.methods.captum.algorithms import algorithm_for, split_arguments
from esegeta_monai.methods.relevance.deeplift import draws

__all__ = ["Captum"]

DIFFERS = 1e-3
"""Difference from the rule at all activations, relative to its largest value, above which a map comes with a
warning."""

_RULES = {"GuidedBackprop": rules.guided, "Deconvolution": rules.deconvolution}


class Captum(Method):
    """Run an attribution algorithm of Captum (Kokhlikyan et al. 2020) on the whole volume.

    An algorithm that needs only values and gradients gets the function ``x ↦ F(x)`` of whole volumes, blended from all
    windows: its map is Captum's own for the whole volume, for every target, with the memory of one window batch. One
    that hooks modules (``DeepLift``, ``DeepLiftShap``, ``GuidedBackprop``, ``Deconvolution``) runs on each window's
    share ``⟨ĝ_w ∂s/∂P, f(x_w)⟩``, and the windows' maps are added. This is exact for the volume, as the sum of these
    shares is F up to a constant for linear targets; Captum's DeepLIFT is refused for others.

    Operations of a network that Captum does not handle are recorded: ``completeness_gap`` where the algorithm promises
    that the map adds up to ``F(x) − F(x₀)`` (DeepLIFT passes calls such as ``F.relu`` as if they were linear), and
    ``difference_from_rule`` where it modifies activations (it knows `torch.nn.ReLU` modules only).

    Args:
        algorithm: a class of `captum.attr` by name, with or without ``captum.attr.``. Those of layers and neurons are
            refused with the method to use.
        arguments: keyword arguments of the class or of its ``attribute``, as in Captum.
        baseline: x₀, where the algorithm has ``baselines``, see `esegeta_monai.engine.baselines`.
        n_baselines: number of draws of x₀ where they are a distribution (``GradientShap``, ``DeepLiftShap``).
        feature_mask: the features, where the algorithm has them, see `esegeta_monai.engine.feature_masks`. They must
            fill the image.

    Raises:
        UsageError: no such algorithm or argument.

    Example:
        >>> Captum("captum.attr.IntegratedGradients", {"n_steps": 16}).additive
        True
    """

    reference = "Kokhlikyan et al. 2020, arXiv:2009.07896"
    produces = "input map"
    additive = False
    full_precision = True

    algorithm: str = "IntegratedGradients"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    baseline: Any = "auto"
    n_baselines: int = 8
    feature_mask: Any = "grid(size=16)"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._name, self._entry = algorithm_for(self.algorithm)
        self._of_class, self._of_call = split_arguments(self._name, self.arguments)
        entry, times_input = self._entry, self._of_class.get("multiply_by_inputs", True)
        if self.n_baselines < 1:
            raise UsageError(f"n_baselines={self.n_baselines}: at least one is needed")
        if self.baseline != "auto" and not entry.baselines if isinstance(self.baseline, str) else not entry.baselines:
            raise UsageError(f"Captum's {self._name} has no baseline, but baseline={self.baseline!r} is given")
        self.name = self.given_name or f"Captum{self._name}"
        self.additive = entry.additive and times_input  # type: ignore[misc]
        self.needs_gradient = entry.gradient  # type: ignore[misc]
        self.needs_linear, self.needs_positive = entry.linear, entry.positive  # type: ignore[misc]
        self.reads_image_value = entry.gap is not None  # type: ignore[misc]
        self.gap_bound = entry.gap or Method.gap_bound  # type: ignore[misc]
        self.gap_advice = (  # type: ignore[misc]
            f"Captum's {self._name} does not handle an operation of this network, or has too few steps or samples; "
            f"{entry.ours} is the method of this package"
        )

    @property
    def signed(self) -> bool:
        return self._entry.signed or self._of_call.get("abs") is False

    @property
    def units(self) -> str:
        divided = self._entry.additive and not self.additive
        return "target per unit of image intensity" if divided else self._entry.units

    @property
    def passes_data_dependent(self) -> bool:
        """True: how often the network runs is known to Captum only."""
        return True

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        entry = self._entry
        notes: dict[str, Any] = {"captum_algorithm": f"captum.attr.{self._name}"}
        given: dict[str, Any] = dict(self._of_call)
        starts: Tensor | None = None
        if entry.baselines:
            baseline = baseline_for(self.baseline, local=not entry.gradient)
            several = self.n_baselines if entry.baselines == "several" else 1
            starts = torch.stack(list(draws(baseline, objective, several)))
            notes |= {"n_baselines": len(starts)} if entry.baselines == "several" else {}
        if entry.features:
            given["feature_mask"] = _whole_labels(objective, self.feature_mask, entry.ours)
        if entry.hooks:
            maps, more = self._by_windows(objective, starts, given)
        else:
            maps, more = self._of_volume(objective, starts, given), {}
        notes |= more
        if starts is not None:
            values = objective.value(starts).mean(1)
            notes |= describe_baseline(baseline, values)
            if self.additive and entry.gap is not None:
                notes |= completeness(maps, objective.image_values().cpu() - values.cpu())
        return Explained(maps, notes)

    def _of_volume(self, objective: Objective, starts: Tensor | None, given: Mapping[str, Any]) -> Tensor:
        """Run the algorithm on ``x ↦ F(x)``, target by target: (k, C, *spatial)."""
        maps = []
        for score in objective.scores:
            one = objective if objective.n_targets == 1 else objective.derive(scores=[score])
            maps.append(self._call(_Volume(one), objective.image[None], starts, given, objective.seed)[0])
        return torch.stack(maps)

    def _by_windows(
        self, objective: Objective, starts: Tensor | None, given: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Run the algorithm on each window's share of F and add the maps: (k, C, *spatial), and notes."""
        rule, differences = _RULES.get(self._name), [0.0] * objective.n_targets

        def of(batch: Batch) -> Tensor:
            parts = batch.image.new_zeros((objective.n_targets, *batch.image.shape))
            for k, cotangent in enumerate(batch.cotangents):
                for j, window in enumerate(batch.windows if cotangent is not None else ()):
                    assert cotangent is not None
                    share = _Share(objective, window, cotangent[j])
                    x0 = None if starts is None else _cut_each(objective, starts, window)
                    parts[k, j] = self._call(share, batch.image[j : j + 1], x0, given, objective.seed)[0]
            if rule is not None and batch.first:
                truth = rule(batch.forward, batch.image, batch.stacked_cotangents(), compare=batch.compare).input
                differences[:] = [_difference(a, b) for a, b in zip(parts, truth)]
            return parts

        maps, padding = objective.scatter(of)
        notes: dict[str, Any] = {"sum_in_padding": padding} if self._entry.additive else {}
        if rule is not None:
            notes["difference_from_rule"] = differences
            for score, difference in zip(objective.scores, differences):
                if difference > DIFFERS:
                    objective.context.progress.warn(
                        f"{self.name}: Captum's {self._name} differs by {100 * difference:.3g} % from the rule at all "
                        f"activations, as it knows nn.ReLU modules only: use {self._entry.ours}",
                        score.label,
                    )
        return maps, notes

    def _call(
        self,
        function: Callable[[Tensor], Tensor],
        image: Tensor,
        starts: Tensor | None,
        given: Mapping[str, Any],
        seed: int,
    ) -> Tensor:
        """Run the algorithm on a function (m, C, …) to (m, 1) at an image (1, C, …) with its draws of the run's seed.

        Raises:
            MethodError: Captum fails on this network; the message has its text and the method to use.
        """
        import captum.attr

        more = dict(given) if starts is None else {**given, "baselines": starts}
        with _seeded(seed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*(forward|backward) hooks", UserWarning)  # they are removed again
            warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients", UserWarning)
            try:
                algorithm = getattr(captum.attr, self._name)(function, **self._of_class)
                with torch.enable_grad():
                    values = algorithm.attribute(image.clone().requires_grad_(self.needs_gradient), target=0, **more)
            except (EsegetaError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # an algorithm may fail in any way on a network
                if out_of_memory(error):
                    raise
                self._refuse(error)
        return values.detach().to(image)

    def _refuse(self, error: Exception) -> NoReturn:
        text = " ".join(str(error).split())[:200]
        raise MethodError(
            f"Captum's {self._name} fails on this network ({type(error).__name__}: {text}): use {self._entry.ours} of "
            "this package, or correct its arguments"
        ) from error


class _Volume:
    """The function of whole volumes (m, C, *spatial) to F (m, 1), differentiable: the gradient is the windows' sum."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, x: Tensor) -> Tensor:
        values: Tensor = _Value.apply(x, self.objective)
        return values


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, objective: Objective) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return objective.value(x.detach()).T.to(x.device)
        gradient = objective.gradient(x.detach())
        ctx.save_for_backward(gradient.maps[0])
        return gradient.values.T.to(x.device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (maps,) = ctx.saved_tensors
        return maps * outer.to(maps).reshape(-1, *(1,) * (maps.ndim - 1)), None


class _Share(nn.Module):
    """A window's share of F, ``⟨ĝ_w ∂s/∂P, f(x_w)⟩``: copies of the window (m, C, *roi) to (m, 1)."""

    def __init__(self, objective: Objective, window: int, cotangent: Tensor) -> None:
        super().__init__()
        self.network = objective.model.network  # Captum hooks the modules that it finds here
        self._run, self._window, self._cotangent = objective.run, window, cotangent

    def forward(self, x: Tensor) -> Tensor:
        out = self._run(x, [self._window] * len(x))
        return (out * self._cotangent).flatten(1).sum(1, keepdim=True)


def _cut_each(objective: Objective, volumes: Tensor, window: int) -> Tensor:
    """Cut a window from volumes (m, C, *spatial): (m, C, *roi) on the network's device."""
    return torch.stack([objective.plan.cut(v, window) for v in volumes]).to(objective.model.device)


def _whole_labels(objective: Objective, spec: Any, ours: str) -> Tensor:
    """Return the number of each voxel's feature (1, 1 or C, *spatial).

    Raises:
        MethodError: some voxels belong to no feature.
    """
    labels = features_for(spec).of(objective).labels
    if bool((labels < 0).any()):
        raise MethodError(
            f"{int((labels < 0).sum())} voxels belong to no feature, and Captum would ablate them too: give a "
            f"feature_mask that fills the image, such as 'grid(size=16)', or use {ours} of this package"
        )
    return labels[None]


def _difference(values: Tensor, truth: Tensor) -> float:
    """Return the largest difference of values and truth, of one shape, relative to the truth's largest value."""
    size = float(truth.abs().max())
    return float((values - truth).abs().max()) / size if size else float(values.abs().max() > 0)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed all random numbers that Captum draws from while the block runs, and restore their states."""
    own, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(own)
            np.random.set_state(of_numpy)
