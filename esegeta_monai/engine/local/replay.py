"""Repeat a part of a pass: the boxes that a perturbation changes, cut with those that the target needs.

forward:   changed(result) = places whose operands meet a computed box
backward:  needed(operand) = places that the needed box of a result depends on
computed:  changed ∩ needed, from the computed boxes of the operands pasted into the unperturbed tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.local.reach import Box, Reach, contains, hull, meet, volume, whole
from esegeta_monai.engine.local.tape import Step, Tape

__all__ = ["Plan", "Planner", "replay"]


@dataclass(frozen=True)
class Part:
    """The computed part of one step.

    Attributes:
        step: the step.
        box: of the result; None: all results, whole.
        operands: for each operand the box that is read; None: nothing.
    """

    step: Step
    box: Box | None
    operands: tuple[Box | None, ...]


@dataclass(frozen=True)
class Plan:
    """The computation for one perturbation.

    Attributes:
        start: the changed box of the window.
        parts: of the steps that compute anything, in order.
        share: of the multiplications of a whole pass.
        output: the box of the output that is computed; None: the target reads nothing that changes.
    """

    start: Box
    parts: tuple[Part, ...]
    share: float
    output: Box | None


class Planner:
    """Plans for one box of the output that the target reads.

    Args:
        tape: the pass.
        wanted: the box of the output.
    """

    def __init__(self, tape: Tape, wanted: Box) -> None:
        self.tape = tape
        self.needed: dict[int, Box | None] = {tape.output: wanted}
        for step in reversed(tape.steps):
            boxes = [self.needed.get(i) for i in step.results]
            if all(box is None for box in boxes):
                continue
            for i, shape, reach in _operands(tape, step):
                read: Box | None = whole(shape)
                if step.local is not None and reach is not None:
                    assert boxes[0] is not None
                    read = reach.needs(step.local.widened(boxes[0], step.shapes[0]))
                    read = read if volume(read) else None
                self.needed[i] = hull(self.needed.get(i), read)

    def plan(self, start: Box) -> Plan:
        """Return what a change of a box of the window requires."""
        tape, done, parts, cost = self.tape, {0: start}, [], 0.0
        for step in tape.steps:
            if not any(i in done for i in step.operands) or all(self.needed.get(i) is None for i in step.results):
                continue
            if step.local is None:
                parts.append(Part(step, None, tuple(whole(tape.shapes[i]) for i in step.operands)))
                done |= {i: whole(tape.shapes[i]) for i in step.results}
                cost += step.cost
                continue
            changed: Box | None = None
            for i, reach in zip(step.operands, step.local.reaches):
                if i in done:
                    changed = hull(changed, reach.touches(done[i]))
            (number,) = step.results
            box = meet(changed, self.needed[number])
            if box is None:
                continue
            box = step.local.widened(box, step.shapes[0])
            read = [reach.needs(box) for reach in step.local.reaches]
            part_of = tuple(part if volume(part) else None for part in read)
            if not any(i in done and meet(done[i], part) for i, part in zip(step.operands, part_of)):
                continue
            parts.append(Part(step, box, part_of))
            done[number] = box
            cost += step.local.cost * volume(box)
        return Plan(start, tuple(parts), cost / max(tape.cost, 1.0), done.get(tape.output))


def _operands(tape: Tape, step: Step) -> list[tuple[int, tuple[int, ...], Reach | None]]:
    reaches: list[Reach | None] = [None] * len(step.operands) if step.local is None else list(step.local.reaches)
    return [(i, tape.shapes[i], reach) for i, reach in zip(step.operands, reaches)]


def replay(plan: Plan, cache: Mapping[int, Tensor], changed: Tensor, tape: Tape) -> Tensor | None:
    """Compute the changed part of the output.

    Args:
        plan: what is computed.
        cache: the kept tensors of the unperturbed window, by number; never written to.
        changed: the changed box of the perturbed window (1, C, *box).
        tape: the pass.

    Returns:
        The output in ``plan.output``; None: it does not change there.
    """
    boxes, values = {0: plan.start}, {0: changed}
    last = {i: position for position, part in enumerate(plan.parts) for i in part.step.operands}
    for position, part in enumerate(plan.parts):
        step = part.step
        if part.box is None:
            read = [_read(i, box, boxes, values, cache) for i, box in zip(step.operands, part.operands) if box]
            for number, value in zip(step.results, step.run(read)):
                boxes[number], values[number] = whole(tape.shapes[number]), value
        else:
            assert step.local is not None
            border = None
            if step.local.border is not None and part.operands[0] is not None:
                border = step.local.border(part.box, part.operands[0])
            given = [
                None if box is None else _read(i, box, boxes, values, cache, border)
                for i, box in zip(step.operands, part.operands)
            ]
            (number,) = step.results
            empty = tuple(box or () for box in part.operands)
            boxes[number], values[number] = part.box, step.local.compute(given, part.box, empty)
        for i in step.operands:
            if last[i] == position and i in values and i != tape.output:
                del values[i], boxes[i]
    return values.get(tape.output)


def _read(
    number: int,
    box: Box,
    boxes: Mapping[int, Box],
    values: Mapping[int, Tensor],
    cache: Mapping[int, Tensor],
    border: tuple[list[tuple[int, int]], float] | None = None,
) -> Tensor:
    """Return a box of a tensor as the perturbation leaves it, with a border."""
    sides, value = border or ([], 0.0)
    bordered = any(before or after for before, after in sides)
    own = boxes.get(number)
    common = None if own is None else meet(own, box)
    if own is not None and contains(own, box):
        part_of = _cut(values[number], box, own)
    elif common is None:
        part_of = _cut(cache[number], box)
    else:
        shape = [stop - start for start, stop in box]
        if bordered:
            part_of = cache[number].new_full([n + a + b for n, (a, b) in zip(shape, sides)], value)
            inside = _cut(part_of, tuple((a, a + n) for n, (a, _) in zip(shape, sides)))
        else:
            part_of = inside = cache[number].new_empty(shape)
        inside.copy_(_cut(cache[number], box))
        _cut(inside, common, box).copy_(_cut(values[number], common, own))
        return part_of
    if bordered:
        amounts = [n for side in reversed(sides) for n in side]
        part_of = F.pad(part_of, amounts, value=value)
    return part_of


def _cut(tensor: Tensor, box: Box, within: Box | None = None) -> Tensor:
    """Return a box of a tensor (*within), in the coordinates in which that is a box."""
    if within is None:
        return tensor[tuple(slice(*side) for side in box)]
    return tensor[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, within))]
