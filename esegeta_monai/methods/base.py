"""What a method is, and how it runs.

A method turns an `Objective` into maps. The simplest one overrides `attribute` and returns a tensor. One that looks at
the whole image in passes over its windows may instead *yield* requests and get their results back; then methods that
run together share those passes (`run_together`).
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
    "Passes",
    "Produces",
    "relative_gap",
]
__all__ += []

Produces = Literal["input map", "layer map", "synthesised image", "activation"]
Limits = tuple[tuple[str, int | None], ...]


@dataclass
class Explained:
    """What a method returns.

    Attributes:
        maps: (k, C, *spatial), a map for each target.
        notes: for the record; a list (or 1-d tensor) of length k is one value a target, anything else is for all.
    """

    maps: Tensor
    notes: dict[str, Any] = field(default_factory=dict)

    def note(self, target: int) -> dict[str, Any]:
        """The notes of one target."""
        k = len(self.maps)
        return {n: _pick(v, target, k) for n, v in self.notes.items()}


@dataclass
class Outcome:
    """What a method came to: its result, or the error that ended it.

    Attributes:
        result: maps and notes; None where the method failed.
        error: the exception that ended the method; None where it succeeded.
        scores: perturbation scores (k, n), where the run asked for a sample of them only
            (`esegeta_monai.engine.run_context.RunContext.sample`); then there is neither result nor error.
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
    """A way to explain. Subclasses become dataclasses; their fields are the parameters.

    Every class states ``produces``, ``additive`` and ``units``, or inherits them from a family base; they are checked
    when the class is defined.

    Class attributes:
        reference: the paper.
        produces: the kind of map: ``"input map"``, ``"layer map"``, ``"synthesised image"`` or ``"activation"``.
        additive: True where the map's voxels are shares of a sum: the map is brought to the scan's grid with its sum
            conserved. Other maps are interpolated.
        units: units of the map's values, in words; a property where they depend on a parameter.
        aliases: further names of the same method.
        needs_gradient: False for black-box methods, which run on TorchScript networks too.
        needs_linear: only scores linear in the prediction (``output="logit"``) make sense.
        full_precision: never under autocast.
        gap_advice: what to do about a completeness gap, in words.
        reads_image_value: the method reads F(image) even for linear targets: one more forward pass where no prediction
            is given, as at the noisy images of `SmoothGrad`.
        cheap_parameters: (name, value) pairs of the parameters that make the method cheap, see `cheap_copy`.
    """

    reference: ClassVar[str] = ""
    produces: ClassVar[Produces]
    aliases: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool]
    needs_gradient: ClassVar[bool] = True
    needs_linear: ClassVar[bool] = False
    full_precision: ClassVar[bool] = False
    reads_image_value: ClassVar[bool] = False
    gap_advice: ClassVar[str] = "read it as a ranking of places, not as shares"
    cheap_parameters: ClassVar[Limits] = (("n_steps", 4), ("n_samples", 4), ("tolerance", None))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_gradient and hasattr(self, "baseline"):  # black-box methods know more words, and read their own
            baseline_for(self.baseline)

    @property
    def signed(self) -> bool:
        """Whether the map has positive and negative values."""
        return True

    @property
    def needs_voxels(self) -> bool:
        """Whether there is nothing to explain where no voxel of the prediction belongs to the target."""
        return True

    @property
    @abstractmethod
    def units(self) -> str:
        """Units of the map's values, in words."""

    @abstractmethod
    def attribute(self, objective: Objective) -> Explained | Tensor | Passes:
        """The maps (k, C, *spatial) of all targets, or a generator of requests that ends in them."""

    def predictions(self, objective: Objective) -> int | None:
        """How often a naive computation predicts the whole image; None: as often as this one looks at the windows."""
        return None

    @property
    def passes_data_dependent(self) -> bool:
        """True if the number of passes depends on values (a tolerance, a line search) and is known only after a run."""
        return any(m.passes_data_dependent for m in self.inside())

    @property
    def passes_exact(self) -> bool:
        """Whether `passes` is known before, or only roughly since it depends on what the run finds."""
        return not self.passes_data_dependent and all(m.passes_exact for m in self.inside())

    def passes(self, objective: Objective) -> int:
        """Window passes that `attribute` needs, for progress and for cost estimates; exact unless a method says so."""
        return len(objective.windows)

    def inside(self) -> list[Method]:
        """The methods that are parameters of this one."""
        return [m for m in (getattr(self, f.name) for f in dataclasses.fields(self)) if isinstance(m, Method)]

    def cheap_copy(self) -> Method:
        """Return the method with few steps or samples, on which the error of half precision is measured.

        A number in ``cheap_parameters`` is an upper limit; None is set as it is. Inner methods become cheap copies too.
        A black-box method stays as it is: of its perturbations only some are scored (`Objective.first_windows`).
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


def relative_gap(maps: Tensor, values: Tensor, baseline_values: Tensor) -> list[float | None]:
    """Completeness gap ``|Σ map − (F(x) − F(x₀))| / |F(x) − F(x₀)|`` a target; None where F does not change.

    Args:
        maps: (k, …).
        values, baseline_values: F at the image and the baseline (k,).
    """
    sums = maps.flatten(1).sum(1, dtype=torch.float64).cpu()
    expected = (values - baseline_values).double().cpu()
    return [abs(float((s - e) / e)) if e != 0 else None for s, e in zip(sums, expected)]
