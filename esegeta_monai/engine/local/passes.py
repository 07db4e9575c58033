"""Window passes of perturbed images, below the window: only what a perturbation changes and a target reads.

A window's unperturbed activations are kept while its perturbations run, one window at a time. A perturbation is
computed in parts where that takes at most `LARGEST_SHARE` of the work of a plain pass, counted in multiplications, so
that the choice is the same in every run. Some of them are also computed plainly, in every run: the first one at a
corner, at a border and in the middle of a window, those whose effect is twice that of all checked before, and at the
end the one of the largest effect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.local.reach import Box, whole
from esegeta_monai.engine.local.replay import Plan, Planner, replay
from esegeta_monai.engine.local.tape import NotLocal, Tape, record
from esegeta_monai.engine.network.model import out_of_memory
from esegeta_monai.engine.objective import Objective

__all__ = ["CACHE_BYTES", "LARGEST_SHARE", "LocalPasses", "PartsDiffer"]

LARGEST_SHARE = 2 / 3
"""Largest share of a plain pass's work at which a perturbation is computed in parts: it then takes 1.5 times less."""

CACHE_BYTES = 2 * 2**30
"""Largest memory in bytes for the activations of one window."""

PLAIN_STEP, PART_STEP = 1e5, 4e5
"""Work of calling one operation, in multiplications: as a whole, and in part, which also finds and pastes its box."""

FIRST = 16
"""Perturbations after which a network that has gained nothing is not looked at again."""

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
"""Largest difference of scores from those of a plain pass, relative to them."""

FEWEST = 4
"""Fewest perturbations of a window that pay for another unperturbed pass of it."""

GROWS = 2.0
"""A perturbation is checked if its effect is this many times that of the largest one checked."""

Measure = Callable[[int, Tensor], Sequence[Sequence[float]]]
"""Function of a window and its output (1, R, *out_roi) that returns, for each target, the numbers that make up
its score; none where it does not see the window."""


class PartsDiffer(Exception):  # noqa: N818 - the scores are computed again by plain passes
    """A perturbation computed in parts differs from a plain pass by more than rounding."""


class LocalPasses:
    """The passes of one set of perturbations.

    Args:
        objective: the case, its network and targets.
        measure: numbers that are compared with those of a plain pass.

    Attributes:
        reason: why passes are plain; None: they may be computed in parts.
        largest_share: largest share of work at which a perturbation is computed in parts.
    """

    def __init__(self, objective: Objective, measure: Measure) -> None:
        self.objective, self.measure = objective, measure
        self.reason = _unsuitable(objective)
        self.largest_share = LARGEST_SHARE
        self._known: dict[str, Tape | str] = objective.memo("recorded pass", dict)
        self._window: int | None = None
        self._input: tuple[int, Tensor] | None = None
        self._expected: dict[int, int] = {}
        self._cache: dict[int, Tensor] = {}
        self._planners: dict[Box, Planner] = {}
        self._checked: set[str] = set()
        self._before: Sequence[Sequence[float]] = ()
        self._largest = 0.0
        self._best: tuple[float, int, Tensor, Tensor] | None = None
        """Effect, window, input and output of the largest effect that has not been checked."""
        self._shares: list[float] = []
        self._n = {"plain": 0, "in parts": 0}
        self._work = self._error = 0.0
        if isinstance(known := self._known.get("tape"), str):
            self.reason = self.reason or known

    # -- passes -----------------------------------------------------------------------------------------------------

    def expect(self, window: int, perturbations: int) -> None:
        """State how many perturbed versions of a window will be run: few do not pay for its unperturbed pass."""
        self._expected[window] = perturbations

    def run(self, x: Tensor, windows: Sequence[tuple[tuple[int, ...], int]]) -> Tensor:
        """Run the network on perturbed windows.

        Args:
            x: (n, C, *roi).
            windows: for each its perturbations, none for the unperturbed window, and the number of the window.

        Returns:
            (n, R, *out_roi).

        Raises:
            PartsDiffer: the check against a plain pass failed.
        """
        results: list[Tensor | None] = [None] * len(windows)
        for j, (indices, w) in enumerate(windows):
            if self.reason is not None:
                break
            try:
                results[j] = self._run_one(x[j : j + 1], w, bool(indices))
            except NotLocal as error:
                self._give_up(str(error))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self._give_up("the memory ran out")
        return self._completed(x, [w for _, w in windows], results)

    def _completed(self, x: Tensor, windows: Sequence[int], results: Sequence[Any]) -> Tensor:
        """Run what is left by plain passes and return all outputs."""
        left = [j for j, result in enumerate(results) if result is None]
        if not left:
            return torch.cat([r for r in results if r is not None])
        out = self.objective.run(x if len(left) == len(x) else x[left], [windows[j] for j in left])
        self._n["plain"] += len(left)
        if len(left) == len(x):
            return out
        rows = dict(zip(left, out.split(1)))
        return torch.cat([rows[j] if r is None else r for j, r in enumerate(results)])

    def _run_one(self, x: Tensor, window: int, perturbed: bool) -> Tensor | None:
        """Return the output of one window (1, R, *out_roi), or None if it is to be computed plainly."""
        if not perturbed:  # of the same batch as without parts: the size of a batch may change the last digit
            return None
        expected = self._expected.get(window, 1)
        if self._known.get("tape") is None:
            if expected < FEWEST:
                return None
            self._keep_activations(window)
        plan = self._plan(x, window)
        if plan is None:
            return None
        if self._window != window:
            if expected < FEWEST:
                return None
            self._keep_activations(window)
        return self._in_parts(x, window, plan)

    def _keep_activations(self, window: int) -> None:
        """Run the unperturbed window and keep its activations. The pass is not counted."""
        self._cache, self._window = {}, None
        objective, x = self.objective, self.objective.window(window)
        tape = self._known.get("tape")
        if tape is None:
            try:
                tape, _ = record(
                    lambda x: objective.run(x, [window], counted=False), x.clone(), objective.model.network
                )
            except NotLocal as error:
                self._known["tape"] = str(error)
                raise
            self._known["tape"] = tape
            if tape.cache_bytes > CACHE_BYTES:
                self._known["tape"] = reason = (
                    f"the activations of a window need {tape.cache_bytes / 2**30:.1f} GiB, more than "
                    f"{CACHE_BYTES / 2**30:.0f} GiB"
                )
                raise NotLocal(reason)
        # also after a recording, whose kernels may round otherwise: a map must not depend on what recorded the pass
        assert isinstance(tape, Tape)
        kept = tape.run(x.clone(), tape.cached)
        self._cache, self._window = kept, window
        self._before = self.measure(window, kept[tape.output])

    def _in_parts(self, x: Tensor, window: int, plan: Plan) -> Tensor:
        """Return the output of a perturbed window (1, R, *out_roi) from the parts that change."""
        tape = self._tape
        before = self._cache[tape.output]
        part = replay(plan, self._cache, x[_index(plan.start)], tape)
        out, effect = before, 0.0
        if part is not None and plan.output is not None:
            at = _index(plan.output)
            out = before.clone()
            out[at] = part
            effect = self._effect(window, out)
        kind = _kind(plan.start, x.shape)
        if kind not in self._checked or effect > GROWS * self._largest or effect != effect:
            self._check(x, window, out)
            self._checked.add(kind)
            self._largest = max(self._largest, effect)
        elif effect > max(self._largest, 0.0 if self._best is None else self._best[0]):
            self._best = effect, window, x.clone(), out
        self.objective.context.progress.passed(1)
        self._n["in parts"] += 1
        self._work += plan.share
        return out

    def _effect(self, window: int, out: Tensor) -> float:
        """Return the change of the numbers that the scores are made of, each target's relative to its |F|."""
        effect = 0.0
        for size, after, before in zip(self._sizes, self.measure(window, out), self._before):
            effect += sum(abs(a - b) for a, b in zip(after, before)) / (size or 1.0)
        return effect

    def finish(self) -> None:
        """Check the perturbation of the largest effect, if it has not been checked.

        Raises:
            PartsDiffer: the check against a plain pass failed.
        """
        best, self._best = self._best, None
        if best is not None and best[0] > self._largest:
            with torch.inference_mode():
                self._check(best[2], best[1], best[3])

    def _check(self, x: Tensor, window: int, out: Tensor) -> None:
        """Compare an output with that of a plain pass."""
        plain = self.objective.run(x, [window], counted=False)  # no pass of the method
        bound = TOLERANCE[x.dtype]
        for size, ours, right in zip(self._sizes, self.measure(window, out), self.measure(window, plain)):
            for a, b in zip(ours, right):
                if a == b or (a != a and b != b):
                    continue
                error = abs(a - b) / max(size, abs(a), abs(b))
                self._error = max(self._error, error)
                if not error <= bound:
                    text = f"a score differs by {error:.1e} of its value, and at most {bound:.0e} is allowed"
                    self._known["tape"] = f"a check failed: {text}"
                    raise PartsDiffer(text)

    @functools.cached_property
    def _sizes(self) -> list[float]:
        """|F| of each target where it is known without a pass, else 0: then windows count by their own scores."""
        objective = self.objective
        if objective.prediction is None or objective.recompute_value:
            return [0.0] * objective.n_targets
        return [float(v) for v in objective.image_values().abs().nan_to_num()]

    # -- plans ------------------------------------------------------------------------------------------------------

    @property
    def _tape(self) -> Tape:
        tape = self._known["tape"]
        assert isinstance(tape, Tape)
        return tape

    def _plan(self, x: Tensor, window: int) -> Plan | None:
        """Return what a perturbed window (1, C, *roi) requires; None: too much of a plain pass."""
        changed = _changed(x, self._unperturbed_input(window))
        if changed is None:
            return None
        wanted = self._wanted(window)
        if wanted not in self._planners:
            self._planners = {wanted: Planner(self._tape, wanted)}
        plan = self._planners[wanted].plan(changed)
        tape = self._tape
        work = plan.share * tape.cost + PART_STEP * len(plan.parts)
        share = work / (tape.cost + PLAIN_STEP * len(tape.steps))
        if len(self._shares) < FIRST:
            self._shares.append(share)
            if len(self._shares) == FIRST and min(self._shares) > self.largest_share:
                least = f"{100 * min(1.0, min(self._shares)):.0f} %"
                self._give_up(f"the first perturbations need at least {least} of the work of a plain pass")
        return plan if share <= self.largest_share else None

    def _unperturbed_input(self, window: int) -> Tensor:
        if self._window == window:
            return self._cache[0]
        if self._input is None or self._input[0] != window:
            self._input = window, self.objective.window(window)
        return self._input[1]

    def _wanted(self, window: int) -> Box:
        """Return the box of a window's output that some target reads."""
        objective = self.objective
        spatial = len(objective.grid.out_roi)
        lo, hi = [10**9] * spatial, [0] * spatial
        for score, windows in zip(objective.scores, objective.score_windows):
            if window in windows:
                inside, _ = objective.grid.meet(score.box, window)
                lo = [min(a, s.start) for a, s in zip(lo, inside)]
                hi = [max(a, s.stop) for a, s in zip(hi, inside)]
        shape = self._tape.shapes[self._tape.output]
        if len(shape) != spatial + 2:
            return whole(shape)
        return (*whole(shape[:2]), *zip(lo, hi))

    # -- what was done ----------------------------------------------------------------------------------------------

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._cache, self._window = {}, None

    def note(self) -> dict[str, Any]:
        """Return what was done, for the record."""
        entries: dict[str, Any] = {"passes_in_parts": self._n["in parts"], "plain_passes": self._n["plain"]}
        tape = self._known.get("tape")
        if self._n["in parts"]:
            entries["share_of_work"] = round(self._work / self._n["in parts"], 4)
            entries["largest_checked_difference"] = self._error
        if isinstance(tape, Tape):
            entries["cache_bytes"] = tape.cache_bytes
            if tape.widened:
                entries["whole_operations"] = tape.widened
        if self.reason is not None:
            entries["reason"] = self.reason
        return entries


def _unsuitable(objective: Objective) -> str | None:
    """Return why the passes of an objective are not computed in parts, before any is looked at."""
    model, plan = objective.model, objective.plan
    if not objective.context.local:
        return "switched off (local=False)"
    if model.autocast_dtype is not None:
        return "under autocast, parts of a window round otherwise than the window"
    if model.members or plan.calls:
        return "several networks or views see each window"
    if objective.context.processes.size > 1:
        return "several processes compute the case together, and a failed check would concern all of them"
    if model.inferer is not None or plan.with_coord or objective.condition is not None:
        return "the network receives more than the window"
    if objective.image.dtype not in TOLERANCE:
        return f"the image is {objective.image.dtype}"
    return None


def _changed(x: Tensor, before: Tensor) -> Box | None:
    """Return the box of voxels in which two windows (1, C, *roi) differ, or None."""
    differs = (x != before).any(1)[0]
    box: list[tuple[int, int]] = []
    for axis in range(differs.ndim):
        others = tuple(i for i in range(differs.ndim) if i != axis)
        line = differs.any(others) if others else differs
        at = line.nonzero().flatten()
        if not len(at):
            return None
        box.append((int(at[0]), int(at[-1]) + 1))
    return (*whole(x.shape[:2]), *box)


def _kind(box: Box, shape: Sequence[int]) -> str:
    """Return where a box of a window of this shape lies."""
    sides = [start == 0 or stop == n for (start, stop), n in zip(box[2:], shape[2:]) if n > 1]
    return "corner" if all(sides) else "border" if any(sides) else "middle"


def _index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*side) for side in box)
