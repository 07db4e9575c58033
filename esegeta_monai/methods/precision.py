"""Mixed precision: autocast where it gives what float32 gives, float32 where it does not.

Half precision rounds what is small beside what is large: a prediction stays right to three digits while its gradient,
or the small difference that a perturbation makes, is noise. So each method is measured before it runs. It is computed
on the first window that each target sees, at a fraction of its cost, both under autocast and in float32; a correlation
below `SURE` for any target, or values that autocast loses, send the whole method to float32, so that whole maps keep
`AGREES`: likely, not surely, since another window may differ (docs/evidence.md). What comes
out of autocast as zeros or as values that are not finite is computed again in float32 too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esegeta_monai.engine.default_layer import default_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.errors import MethodTimeout, RankLost, named_reason
from esegeta_monai.utils.tensors import all_finite

logger = logging.getLogger("esegeta_monai")

if TYPE_CHECKING:
    from esegeta_monai.methods.base import Method, Outcome

__all__ = ["AGREES", "SURE", "Agreement", "agreement", "full_precision", "run_precisely"]

AGREES = 0.99
"""The correlation with float32 that a map keeps."""

SURE = 0.997
"""What one window must show for it. It is a sample: whole maps have up to three times its noise."""

SAMPLED = 16
"""How many perturbations of a window are scored to measure a method that perturbs the image."""

KEPT = 0.5
"""The share of float32's non-zero values that autocast must keep: less is underflow, whatever the correlation."""

NOT_WORTH_IT = "measuring would take as many passes as the map in float32"
"""Why a method is not measured, see `_pays`."""

RunMethods = Callable[["Sequence[Method]", Objective], "list[Outcome]"]


@dataclass(frozen=True)
class Agreement:
    """How autocast and float32 agree on one method.

    Attributes:
        correlation: Pearson's, on the first window of each target; None where there is none.
        fallback: why the method runs in float32; None: it runs under autocast.
    """

    correlation: list[float | None] = field(default_factory=list)
    fallback: str | None = None

    def notes(self) -> dict[str, Any]:
        """For the record."""
        return {"amp_correlation": self.correlation or None, "amp_fallback": self.fallback}


def run_precisely(methods: Sequence[Method], objective: Objective, run_methods: RunMethods) -> list[Outcome]:
    """Run methods together, each in the precision that is enough for it.

    With `Model.amp` off there is one precision. With it, `Method.full_precision` methods run in float32 without being
    measured; the others are measured first, and their results carry ``amp_correlation`` and ``amp_fallback`` in their
    notes. A method that runs inside another one is not measured again.

    Args:
        methods: the methods.
        objective: the case.
        run_methods: runs methods on an objective in the precision that it has.

    Returns:
        The outcome of each method, in order.
    """
    if objective.model.autocast_dtype is None:
        return run_methods(methods, objective)
    outcomes: dict[int, Outcome] = {}
    agreements: dict[int, Agreement] = {}
    half = [i for i, m in enumerate(methods) if not m.full_precision]
    inside = objective.context.precision_decided
    if half and not inside:
        agreements = {i: Agreement(fallback=NOT_WORTH_IT) for i in half if not _pays(methods[i], objective)}
        half = [i for i in half if i not in agreements]
    if half and not inside:
        measured = measure([methods[i] for i in half], objective, run_methods)
        agreements |= dict(zip(half, objective.context.processes.gather(measured)[0]))
        half = [i for i in half if agreements[i].fallback is None]
    if half:
        with _precision_decided(objective.context):
            outcomes = dict(zip(half, run_methods([methods[i] for i in half], objective)))
    if not inside:
        for i, reason in _lost(outcomes, objective).items():
            agreements[i] = replace(agreements[i], fallback=reason)
            del outcomes[i]
    again = [i for i in range(len(methods)) if i not in outcomes]
    if again:
        precise = full_precision(objective)
        outcomes |= zip(again, run_methods([methods[i] for i in again], precise))
        if precise.knows("value"):  # what the maps add up to
            for result in (outcomes[i].result for i in again):
                if result is not None:
                    result.notes.setdefault("value", precise.image_values())
    for i, agreement in agreements.items():
        if agreement.fallback is not None:
            logger.warning("%s runs in float32: %s", methods[i].name, agreement.fallback)
        if (result := outcomes[i].result) is not None:
            result.notes |= agreement.notes()
    return [outcomes[i] for i in range(len(methods))]


def full_precision(objective: Objective) -> Objective:
    """Return the same objective without autocast, always the same one; the objective itself where there is none.

    It shares nothing that was computed in half precision: unperturbed scores, checkpoints and the prediction at the
    image are its own. Masks stay as they are.
    """
    if objective.model.autocast_dtype is None:
        return objective
    return objective.memo("full precision", lambda: objective.derive(full_precision=True))


def _pays(method: Method, objective: Objective) -> bool:
    """Whether measuring is cheaper than what it may save: not so for few steps on a volume of one window, nor for few
    perturbations."""
    predictions = method.predictions(objective)
    if predictions is None:
        return len(objective.plan) > 1 or 2 * method.cheap_copy().passes(objective) < method.passes(objective)
    first = {windows[0] for windows in objective.score_windows if windows}
    return 2 * len(first) * min(SAMPLED, predictions) < method.passes(objective)


def measure(methods: Sequence[Method], objective: Objective, run_methods: RunMethods) -> list[Agreement]:
    """How each method agrees with float32 on the first window that each target sees.

    Cheap copies (`Method.cheap_copy`) run on an objective of these windows alone, once in float32 and once under
    autocast; gradient and CAM methods share these passes as they share the others. Maps are compared, or for methods
    that perturb the image the scores of `SAMPLED` perturbations: the map of a few would be a map of something else,
    and a raw score would hide its small differences.
    """
    cheap = [m.cheap_copy() for m in methods]
    context = objective.context.for_sample(SAMPLED, objective.window_batch)
    half = objective.derive(first_windows=1, context=context)
    full = full_precision(half)
    precise = run_methods(cheap, full)
    if full.knows("default layer"):  # a gradient of zero must not choose the layer
        for one in (half, objective):
            one.memo("default layer", lambda: default_layer(full))
    rough = run_methods(cheap, half)
    dtype = str(objective.model.autocast_dtype).removeprefix("torch.")
    return [_compared(a, b, dtype) for a, b in zip(rough, precise)]


def _compared(rough: Outcome, precise: Outcome, dtype: str) -> Agreement:
    b = _values(precise)
    if isinstance(b, Exception):
        return Agreement(fallback=f"float32 gave nothing to compare on the first window: {named_reason(b)}")
    a = _values(rough)
    if isinstance(a, Exception):
        return Agreement(fallback=f"it fails in {dtype}: {named_reason(a)}")
    found = [agreement(mine, theirs, dtype) for mine, theirs in zip(a, b)]
    correlations = [r for r, _ in found]
    worst = min((r for r in correlations if r is not None), default=None)
    lost = [why for r, why in found if r is None or r == worst]
    return Agreement(correlations, next((why for why in lost if why is not None), None))


def agreement(rough: Tensor, precise: Tensor, dtype: str = "half precision") -> tuple[float | None, str | None]:
    """Pearson's correlation of two sets of values where either is not zero, and why it is not enough, or None.

    Places where both are zero, such as all that lies outside the window, would make any two maps alike.

    >>> agreement(torch.tensor([1.0, 1.0, 3.0, 3.0]), torch.tensor([1.0, 1.0, 3.0, 3.0]))
    (1.0, None)
    >>> agreement(torch.tensor([0.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))[1]
    'underflow: of 3 values that are not zero in float32, half precision keeps 1'
    """
    a, b = (v.detach().flatten().to(_for_sums(v.device), torch.float64) for v in (rough, precise))
    if not bool(torch.isfinite(a).all()):
        return None, f"overflow: {int((~torch.isfinite(a)).sum())} values are not finite in {dtype}"
    some = int((b != 0).sum())
    if not some:
        return None, "the first window is zero in float32, so there is nothing to compare"
    kept = int(((a != 0) & (b != 0)).sum())
    if kept < KEPT * some:
        return None, f"underflow: of {some} values that are not zero in float32, {dtype} keeps {kept}"
    seen = (a != 0) | (b != 0)
    a, b = a[seen] - a[seen].mean(), b[seen] - b[seen].mean()
    norm = float(a.norm() * b.norm())
    if not norm > 0:  # NaN too: float32 itself is not finite
        return None, "the first window's values do not vary, so they have no correlation with float32"
    r = min(1.0, float(a @ b) / norm)
    return r, None if r >= SURE else f"correlation {r:.4f} with float32 on the first window, below {SURE}"


def _for_sums(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


def _values(outcome: Outcome) -> Tensor | Exception:
    """Return what is compared, (k, …): scores where the method perturbs the image, else maps; or why there is none."""
    if outcome.scores is not None:
        return outcome.scores
    if outcome.result is not None:
        return outcome.result.maps
    assert outcome.error is not None
    return outcome.error


def _lost(outcomes: dict[int, Outcome], objective: Objective) -> dict[int, str]:
    """Why results of autocast are computed again, by position; all ranks decide alike."""
    dtype = str(objective.model.autocast_dtype).removeprefix("torch.")
    lost: dict[int, str] = {}
    for i, outcome in outcomes.items():
        if isinstance(outcome.error, (MethodTimeout, RankLost)):
            continue
        if outcome.result is None:
            assert outcome.error is not None
            lost[i] = f"it fails in {dtype}: {named_reason(outcome.error)}"
        elif not all_finite(outcome.result.maps):
            lost[i] = f"overflow: the map has values that are not finite in {dtype}"
        elif not bool(outcome.result.maps.flatten(1).any(1).all()):
            lost[i] = f"underflow: the map is zero everywhere in {dtype}"
    everywhere: dict[int, str] = {}
    for one in objective.context.processes.gather(lost):
        everywhere = one | everywhere
    return everywhere


@contextmanager
def _precision_decided(context: RunContext) -> Iterator[None]:
    """Inside, methods that other methods run are not measured."""
    before, context.precision_decided = context.precision_decided, True
    try:
        yield
    finally:
        context.precision_decided = before
