"""What a method is, and how it runs.

A method turns an `Objective` into maps. The simplest one overrides `attribute` and returns a tensor. One that looks at
the whole image in passes over its windows may instead *yield* requests and get their results back; then methods that
run together share those passes (`run_together`).
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from esegeta_monai.baselines import baseline_for
from esegeta_monai.configurable import Configurable, Registry
from esegeta_monai.objective import Objective, Request
from esegeta_monai.parameters import check_stated
from esegeta_monai.precision import run_precisely

__all__ = ["METHODS", "Explained", "Method", "Passes", "Produces", "grouped", "relative_gap", "run"]
__all__ += ["run_together", "shares_passes"]

Produces = Literal["input map", "layer map", "synthesised image", "activation"]


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


def _pick(value: Any, target: int, k: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == k:
        return value[target].tolist()
    if isinstance(value, list) and len(value) == k:
        return value[target]
    return value.tolist() if isinstance(value, Tensor) else value


Passes = Generator[Request, Any, "Explained | Tensor"]


class Method(Configurable, ABC):
    """How it is explained. Subclasses are dataclasses, their fields the parameters.

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
        needs_value: also where the target is linear, F at the image is asked for: a forward pass where no prediction is
            known, as at the noisy images of `SmoothGrad`.
        brief: names and values of parameters with which the method is cheap, where it has them, see `in_brief`.
    """

    reference: ClassVar[str] = ""
    produces: ClassVar[Produces]
    aliases: ClassVar[tuple[str, ...]] = ()
    additive: ClassVar[bool]
    needs_gradient: ClassVar[bool] = True
    needs_linear: ClassVar[bool] = False
    full_precision: ClassVar[bool] = False
    needs_value: ClassVar[bool] = False
    gap_advice: ClassVar[str] = "read it as a ranking of places, not as shares"
    brief: ClassVar[tuple[tuple[str, int | None], ...]] = (("n_steps", 4), ("n_samples", 4), ("tolerance", None))

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
    def steered(self) -> bool:
        """Whether values decide how many passes it needs (a tolerance, a line search): only a whole run tells."""
        return any(m.steered for m in self.inside())

    @property
    def passes_exact(self) -> bool:
        """Whether `passes` is known before, or only roughly since it depends on what the run finds."""
        return not self.steered and all(m.passes_exact for m in self.inside())

    def passes(self, objective: Objective) -> int:
        """Window passes that `attribute` needs, for progress and for cost estimates; exact unless a method says so."""
        return len(objective.windows)

    def inside(self) -> list[Method]:
        """The methods that are parameters of this one."""
        if not dataclasses.is_dataclass(self):
            return []
        return [m for m in (getattr(self, f.name) for f in dataclasses.fields(self)) if isinstance(m, Method)]

    def in_brief(self) -> Method:
        """The same method at a fraction of its cost, with few steps or samples: what half precision is measured on.

        A number in ``brief`` is the most that a parameter keeps. Methods inside are in brief too. A black-box method
        stays as it is: of its perturbations only some are scored (`Objective.first_windows`).
        """
        if not dataclasses.is_dataclass(self):
            return self
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed: dict[str, Any] = {n: m.in_brief() for n, m in own.items() if isinstance(m, Method)}
        for name, value in self.brief if self.needs_gradient or type(self).brief is not Method.brief else ():
            if name in own:
                changed[name] = value if value is None or own[name] is None else min(own[name], value)
        return dataclasses.replace(self, **changed) if changed else self

    def __init_subclass__(cls, registered: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_stated(cls, {"produces": Produces, "additive": bool, "units": str})
        if registered and cls.__module__.startswith("esegeta_monai.") and not cls.__name__.startswith("_"):
            METHODS.register(cls, *cls.__dict__.get("aliases", ()))


METHODS: Registry[Method] = Registry("method", Method, "esegeta_monai.methods")


def run(method: Method, objective: Objective) -> Explained:
    """One method alone."""
    outcome = run_together([method], objective)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_together(methods: Sequence[Method], objective: Objective) -> dict[int, Explained | Exception]:
    """Several methods in lock-step, each in the precision that is enough for it (`esegeta_monai.precision`).

    Returns results by position in ``methods``; a method that fails leaves its exception as its result.
    """
    return run_precisely(methods, objective, _lock_step)


def _lock_step(methods: Sequence[Method], objective: Objective) -> dict[int, Explained | Exception]:
    """Several methods in one precision: what they ask of the windows in the same round is done in one sweep.

    A method that fails leaves its exception as its result; a sweep that fails is done again for each method alone, so
    that only the culprit fails.
    """
    results: dict[int, Explained | Exception] = {}
    running: dict[int, Passes] = {}
    asked: dict[int, Request] = {}

    def step(i: int, passes: Passes, answer: Any) -> None:
        try:
            asked[i] = passes.send(answer)
            running[i] = passes
        except StopIteration as stop:
            results[i] = _explained(stop.value, methods[i], objective)
        except Exception as error:  # kept as the method's result, which the caller raises or records
            results[i] = error

    for i, method in enumerate(methods):
        try:
            outcome = method.attribute(objective)
        except Exception as error:  # as above
            results[i] = error
            continue
        if isinstance(outcome, Generator):
            step(i, outcome, None)
        else:
            results[i] = _explained(outcome, method, objective)
    while running:
        current = running
        now = _due({i: asked[i] for i in sorted(current)})
        running = {i: passes for i, passes in current.items() if i not in now}
        for i, answer in _answers(objective, now).items():
            if isinstance(answer, Exception):
                results[i] = answer
            else:
                step(i, current[i], answer)
    return results


def _due(asked: dict[int, Request]) -> dict[int, Request]:
    """What is asked for in the next sweep: gradients wait while some method has yet to look at activations before it
    asks for them too, since one backward pass serves all."""
    if not any(r.before_gradient for r in asked.values()):
        return asked
    return {i: r for i, r in asked.items() if not r.backward}


def _answers(objective: Objective, asked: dict[int, Request]) -> dict[int, Any]:
    try:
        return dict(zip(asked, objective.sweep(list(asked.values()))))
    except Exception as error:  # kept as the result of the one method that asked
        if len(asked) == 1:
            return dict.fromkeys(asked, error)
    return {i: answer for i, request in asked.items() for answer in _answers(objective, {i: request}).values()}


def _explained(value: Explained | Tensor, method: Method, objective: Objective) -> Explained:
    """What a method returned, with a warning where its completeness gap is above `GAP`."""
    explained = value if isinstance(value, Explained) else Explained(value)
    gaps = explained.notes.get("completeness_gap") or []
    for score, gap in zip(objective.scores, gaps):
        start = f"{method.name}: the map's sum misses what it should add up to by"
        told = any(w.startswith(f"{score.label}: {start}") for w in objective.monitor.warnings)  # at other noisy images
        if gap is not None and gap > GAP and not told:
            objective.monitor.warn(f"{start} {100 * gap:.0f} %: {method.gap_advice}", score.label)
    return explained


GAP = 0.05
"""The relative completeness gap above which a map comes with a warning."""


def relative_gap(maps: Tensor, values: Tensor, baseline_values: Tensor) -> list[float | None]:
    """Completeness gap ``|Σ map − (F(x) − F(x₀))| / |F(x) − F(x₀)|`` a target; None where F does not change.

    Args:
        maps: (k, …).
        values, baseline_values: F at the image and the baseline (k,).
    """
    sums = maps.flatten(1).sum(1, dtype=torch.float64).cpu()
    expected = (values - baseline_values).double().cpu()
    return [abs(float((s - e) / e)) if e != 0 else None for s, e in zip(sums, expected)]


def shares_passes(method: Method) -> bool:
    """Whether a method asks for sweeps over the windows that others can share."""
    return inspect.isgeneratorfunction(type(method).attribute)


def grouped(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods in their order; those that can share passes come together, at the place of the first."""
    groups: list[list[Method]] = []
    sharing: list[Method] = []
    for method in methods:
        if shares_passes(method):
            if not sharing:
                groups.append(sharing)
            sharing.append(method)
        else:
            groups.append([method])
    return groups
