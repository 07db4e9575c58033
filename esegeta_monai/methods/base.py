"""The base class of attribution methods, and their results.

A method turns an `Objective` into maps. The simplest one overrides `attribute` and returns a tensor. A method that
needs passes over the windows may instead *yield* requests and get their results back (`esegeta_monai.engine.sweep`);
methods that run together then share those passes.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request
from esegeta_monai.utils.registry import Configurable, Registry
from esegeta_monai.utils.types import check_stated

__all__ = [
    "METHODS",
    "Explained",
    "Method",
    "Outcome",
    "Passes",
    "Produces",
    "completeness",
    "gaps",
]

Produces = Literal["input map", "layer map", "synthesised image", "activation"]
Limits = tuple[tuple[str, int | None], ...]


@dataclass
class Explained:
    """The result of a method.

    Attributes:
        maps: one map per target (k, C, *spatial), in the method's units.
        notes: entries of the record; a list, or a tensor with at least one axis, of length k has one value per target,
            anything else concerns all targets.
    """

    maps: Tensor
    notes: dict[str, Any] = field(default_factory=dict)

    def note(self, target: int) -> dict[str, Any]:
        """Return the notes of one target."""
        k = len(self.maps)
        return {n: _pick(v, target, k) for n, v in self.notes.items()}


@dataclass
class Outcome:
    """The result of a method, or the error that ended it.

    Attributes:
        result: maps and notes; None where the method failed.
        error: the exception that ended the method; None where it succeeded.
        scores: perturbation scores (k, n), float64, if the run asked for a sample only
            (`esegeta_monai.engine.run_context.RunContext.sample`); then ``error`` is a `SampleComplete`.
    """

    result: Explained | None = None
    error: Exception | None = None
    scores: Tensor | None = None


def _pick(value: Any, target: int, k: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == k:
        return value[target].tolist()
    if isinstance(value, list) and len(value) == k:
        return value[target]
    return value.tolist() if isinstance(value, Tensor) else value


Passes = Generator[Request, Any, "Explained | Tensor"]


class Method(Configurable, ABC):
    """An attribution method. Subclasses become dataclasses whose fields are the parameters.

    Every class states ``produces``, ``additive`` and ``units``, or inherits them from a base class; they are checked
    when the class is defined.

    Class attributes:
        reference: the paper.
        produces: the kind of map: ``"input map"``, ``"layer map"``, ``"synthesised image"`` or ``"activation"``.
        additive: True if the map's voxels are shares of a sum: resampling to the scan's grid then conserves the sum.
            Other maps are interpolated.
        units: units of the map's values, in words; a property if they depend on a parameter.
        aliases: further names of the method.
        needs_gradient: False for black-box methods, which also run on TorchScript networks.
        needs_linear: True if the method is defined for scores linear in the prediction only (``output="logit"``).
        for_ensembles: False: the method belongs to the weights of one network; it is refused for ensembles and
            mirrored views.
        needs_positive: True if the method propagates positive signals only, so that a linear score must rise with all
            outputs that it reads (a score that falls with one is refused).
        full_precision: True: never run the method under autocast.
        gap_bound: completeness gap above which a map is incomplete; a method with ``tolerance`` has its own.
        gap_advice: advice for an incomplete map.
        repeats_in_float64: True: a float32 map that is incomplete is computed again in float64, since only rounding can
            be the cause.
        reads_image_value: the method reads F(image) even for linear targets: one more forward pass where no prediction
            was given, as at the noisy images of `SmoothGrad`.
        map_check: the check of finished maps of this class, a key of `esegeta_monai.explain.map_checks.MAP_CHECKS`;
            ``"none"``: there is no independent computation. It is not inherited.
        cheap_parameters: (name, value) pairs of the parameters that make the method cheap, see `cheap_copy`.
    """

    reference: ClassVar[str] = ""
    produces: ClassVar[Produces]
    aliases: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool]
    needs_gradient: ClassVar[bool] = True
    needs_linear: ClassVar[bool] = False
    for_ensembles: ClassVar[bool] = True
    needs_positive: ClassVar[bool] = False
    full_precision: ClassVar[bool] = False
    reads_image_value: ClassVar[bool] = False
    repeats_in_float64: ClassVar[bool] = False
    gap_bound: ClassVar[float] = 5e-2
    gap_advice: ClassVar[str] = "read it as a ranking of places, not as shares"
    map_check: ClassVar[str] = "none"
    cheap_parameters: ClassVar[Limits] = (("n_steps", 4), ("n_samples", 4), ("tolerance", None))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_gradient and hasattr(self, "baseline"):  # black-box methods accept more baselines and parse them
            baseline_for(self.baseline)

    @property
    def signed(self) -> bool:
        """True if the map has positive and negative values."""
        return True

    @property
    def completeness_bound(self) -> float:
        """Completeness gap above which a map is incomplete: the stated ``tolerance``, or ``gap_bound``."""
        tolerance: float | None = getattr(self, "tolerance", None)
        return self.gap_bound if tolerance is None else tolerance

    @property
    def needs_voxels(self) -> bool:
        """True if there is nothing to explain when no voxel of the prediction belongs to the target."""
        return True

    @property
    @abstractmethod
    def units(self) -> str:
        """Units of the map's values, in words."""

    @abstractmethod
    def attribute(self, objective: Objective) -> Explained | Tensor | Passes:
        """Compute the maps of all targets (k, C, *spatial).

        Returns:
            The maps, or an `Explained` with notes; or a generator of requests that returns either.

        Raises:
            MethodError: the method cannot be computed on this case.
        """

    def predictions(self, objective: Objective) -> int | None:
        """Return how often a naive computation predicts the whole image; None: once per pass of this one."""
        return None

    @property
    def passes_data_dependent(self) -> bool:
        """True if the number of passes depends on values (a tolerance, a line search) and is known only after a run."""
        return any(m.passes_data_dependent for m in self.inside())

    @property
    def passes_exact(self) -> bool:
        """True if `passes` is exact before the run; False if it depends on values that the run computes."""
        return not self.passes_data_dependent and all(m.passes_exact for m in self.inside())

    def passes(self, objective: Objective) -> int:
        """Return the window passes of `attribute`, for progress and cost estimates; exact if `passes_exact`."""
        return len(objective.windows)

    def foreseen(self, objective: Objective) -> str | None:
        """Return what the method can find on this case, known before it runs, for the dry run; None: nothing to say."""
        return None

    def inside(self) -> list[Method]:
        """Return the methods that are parameters of this one."""
        return [m for m in (getattr(self, f.name) for f in dataclasses.fields(self)) if isinstance(m, Method)]

    def cheap_copy(self) -> Method:
        """Return the method with few steps or samples, on which the error of half precision is measured.

        A number in ``cheap_parameters`` is an upper limit; None is set as a value. Inner methods become cheap copies
        too. A black-box method does not change: only a sample of its perturbations is scored
        (`esegeta_monai.engine.run_context.ScoreSample`).
        """
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {n: m.cheap_copy() for n, m in own.items() if isinstance(m, Method)}
        if self.needs_gradient or self.cheap_parameters is not Method.cheap_parameters:
            for name, limit in self.cheap_parameters:
                if name in own:
                    changed[name] = limit if limit is None or own[name] is None else min(own[name], limit)
        return dataclasses.replace(self, **changed) if changed else self

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_stated(cls, {"produces": Produces, "additive": bool, "units": str})
        if registered and cls.__module__.startswith("esegeta_monai.") and not cls.__name__.startswith("_"):
            METHODS.register(cls, *cls.__dict__.get("aliases", ()))


METHODS: Registry[Method] = Registry("method", Method, "esegeta_monai.methods")


def completeness(maps: Tensor, expected: Tensor, elsewhere: Tensor | None = None) -> dict[str, list[float | None]]:
    """Compare the sums of maps with what they should add up to.

    Args:
        maps: attributions (k, …).
        expected: the sums that they should have (k,), such as ``F(x) − F(x₀)``.
        elsewhere: parts of these sums that are not in the maps (k,), such as relevance that biases absorb.

    Returns:
        Notes with one value per target: ``completeness_gap``, the absolute difference relative to ``|expected|``, None
        where this is 0, and ``completeness_gap_of_map``, relative to the sum of the map's absolute values, None where
        this is 0.

    >>> completeness(torch.tensor([[1.0, 2.0]]), torch.tensor([4.0]))
    {'completeness_gap': [0.25], 'completeness_gap_of_map': [0.3333333333333333]}
    """
    sums = maps.flatten(1).sum(1, dtype=torch.float64).cpu()
    sizes = maps.flatten(1).abs().sum(1, dtype=torch.float64).cpu()
    return gaps(sums if elsewhere is None else sums + elsewhere.double().cpu(), sizes, expected)


def gaps(sums: Tensor, sizes: Tensor, expected: Tensor) -> dict[str, list[float | None]]:
    """Return the notes of `completeness` from the sums of maps and of their absolute values, (k,) each."""
    expected = expected.double().cpu()
    missed = (sums - expected).abs()
    return {
        "completeness_gap": [float(m / e.abs()) if e != 0 else None for m, e in zip(missed, expected)],
        "completeness_gap_of_map": [float(m / size) if size != 0 else None for m, size in zip(missed, sizes)],
    }
