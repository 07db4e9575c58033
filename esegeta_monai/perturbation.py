"""``F(x') − F(x)`` for many perturbations of one volume, recomputing only the windows that each one touches.

    linear s:      F(x') − F(x) = Σ_touched (F_w(x'_w) − F_w(x_w))
    non-linear s:  ΔP = Σ_touched ĝ_w (f(x'_w) − f(x_w)) on the support of s,   F(x') − F(x) = s(P + ΔP) − s(P)

A perturbation says what it changes; it never holds a copy of the volume. (perturbation, window) pairs of different
windows share batches; a pair that changes no voxel is never computed, and perturbations that are equal inside a window
share one pass of it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from esegeta_monai.objective import Batch, Objective, out_of_memory
from esegeta_monai.windows import Slices, _overlap

__all__ = ["UNCHANGED", "Boxes", "Perturbations", "change", "known_change", "passes_needed"]

BLOCK_BYTES = 256 * 2**20
"""Memory for the ΔP of the perturbations in flight and, beside it, for cached unperturbed outputs (non-linear s)."""

UNCHANGED: Final = "unchanged"
"""The `Perturbations.key` of a window in which the perturbation changes nothing."""


class Perturbations(ABC):
    """m perturbations of one volume (C, *spatial), described by what each changes."""

    @abstractmethod
    def __len__(self) -> int:
        """m."""

    @abstractmethod
    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        """The perturbed copy of ``crop`` (C, *place), which lies at ``place`` of the volume. Never changes ``crop``."""

    def box(self, index: int) -> Slices | None:
        """The box of voxels that perturbation ``index`` may change; None: any voxel."""
        return None

    def key(self, index: int, window: int, place: Slices) -> Hashable | None:
        """What determines the perturbed window, so that equal ones are computed once; None: always computed.

        `UNCHANGED` says that nothing of the window is changed: then it is not even looked at.
        """
        return None

    def identity(self, index: int) -> Hashable | None:
        """What determines the whole perturbation, for `known_change`; None: nothing else is ever equal to it."""
        return None

    def take(self, indices: Sequence[int]) -> Perturbations:
        """Some of these perturbations."""
        return _Part(self, list(indices))


class _Part(Perturbations):
    """Some of other perturbations."""

    def __init__(self, whole: Perturbations, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        return self.whole.apply(self.indices[index], crop, place)

    def box(self, index: int) -> Slices | None:
        return self.whole.box(self.indices[index])

    def key(self, index: int, window: int, place: Slices) -> Hashable | None:
        return self.whole.key(self.indices[index], window, place)

    def identity(self, index: int) -> Hashable | None:
        return self.whole.identity(self.indices[index])


class Boxes(Perturbations):
    """Boxes replaced by a baseline.

    Args:
        starts, stops: (m, d) corners, ``stops`` excluded.
        baseline: (C, *spatial) volume or a number.
        channels: for each box the channels that are replaced; None: all.
    """

    def __init__(
        self,
        starts: Sequence[Sequence[int]],
        stops: Sequence[Sequence[int]],
        baseline: Tensor | float = 0.0,
        channels: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.boxes = [tuple(slice(a, b) for a, b in zip(s, t)) for s, t in zip(starts, stops)]
        self.baseline, self.channels = baseline, channels

    def __len__(self) -> int:
        return len(self.boxes)

    def box(self, index: int) -> Slices:
        return self.boxes[index]

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        common = [slice(max(b.start, p.start), min(b.stop, p.stop)) for b, p in zip(self.boxes[index], place)]
        inside = tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(common, place))
        rows = slice(None) if self.channels is None else list(self.channels[index])
        perturbed = crop.clone()
        value = self.baseline
        if isinstance(value, Tensor):
            value = value[_rows(rows, common)].to(crop.device, crop.dtype)
        perturbed[_rows(rows, inside)] = value
        return perturbed


def _rows(channels: Any, place: Sequence[slice]) -> tuple[Any, ...]:
    return (channels, *place)


@dataclass(frozen=True)
class _Pair:
    """One perturbed window, and all perturbations that are equal there."""

    indices: tuple[int, ...]
    window: int


def change(objective: Objective, perturbations: Perturbations) -> Tensor:
    """``F(x') − F(x)`` for every perturbation and target: (k, m), float64, on the CPU.

    Batches hold ``objective.window_batch`` pairs; where memory runs out they are halved.
    """
    if objective.linear:
        return _LinearChange(objective, perturbations).run()
    return _BlendedChange(objective, perturbations).run()


def known_change(objective: Objective, perturbations: Perturbations) -> Tensor:
    """`change`, where a perturbation that any method has scored on this objective before is looked up: (k, m)."""
    table = _TABLES.setdefault(objective, {})
    names = [perturbations.identity(i) for i in range(len(perturbations))]
    first: dict[Hashable, int] = {}
    for i, name in enumerate(names):
        if name is None or name not in table:
            first.setdefault(i if name is None else (name,), i)
    found = change(objective, perturbations.take(list(first.values())))
    columns = {i: j for j, i in enumerate(first.values())}
    for i, j in columns.items():
        if (name := names[i]) is not None:
            table[name] = found[:, j].clone()
    rows = [found[:, columns[i]] if name is None else table[name] for i, name in enumerate(names)]
    return torch.stack(rows, 1) if rows else found


_TABLES: WeakKeyDictionary[Objective, dict[Hashable, Tensor]] = WeakKeyDictionary()
"""Scores by objective and `Perturbations.identity`: shared by the methods that run on one objective."""


def passes_needed(objective: Objective, perturbations: Perturbations) -> int:
    """Window passes that `change` needs, at most: pairs that change no voxel are found only while running."""
    m, windows = len(perturbations), objective.windows
    block = m if objective.linear else _block_size(objective, m)
    blocks = [range(a, min(a + block, m)) for a in range(0, m, max(block, 1))]
    pairs = sum(len(_groups(perturbations, part, w, objective.plan.place(w))) for part in blocks for w in windows)
    if objective.linear:
        return pairs + len(windows)
    itemsize = objective.image.element_size()
    kept = len(windows) * len(objective.read) * math.prod(objective.grid.out_roi) * itemsize <= BLOCK_BYTES
    blending = len(windows) if objective.prediction is None else 0
    return pairs + len(windows) * (1 if kept else len(blocks)) + blending


def _groups(perturbations: Perturbations, indices: Sequence[int], window: int, place: Slices) -> list[tuple[int, ...]]:
    """The perturbations that may change a window, those that are equal there together."""
    groups: dict[Hashable, list[int]] = {}
    for i in indices:
        box = perturbations.box(i)
        if box is not None and not _overlap(place, box):
            continue
        key = perturbations.key(i, window, place)
        if key != UNCHANGED:
            groups.setdefault(("alone", i) if key is None else ("key", key), []).append(i)
    return [tuple(g) for g in groups.values()]


def _block_size(objective: Objective, m: int) -> int:
    """How many ΔP fit in `BLOCK_BYTES`."""
    size = sum(len(s.channels) * math.prod(b.stop - b.start for b in s.box) * 8 for s in objective.scores)
    return max(1, min(m, BLOCK_BYTES // max(size, 1)))


class _Change:
    """What both kinds share: windows outside, perturbations inside, so that a window is cut once."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        self.objective, self.perturbations = objective, perturbations
        self.result = torch.zeros((objective.n_targets, len(perturbations)), dtype=torch.float64)

    def pairs(self, indices: Sequence[int]) -> Iterator[tuple[_Pair, Tensor]]:
        """(pair, perturbed window) for all pairs that change a voxel."""
        plan, device = self.objective.plan, self.objective.model.device
        for w in self.objective.windows:
            place = plan.place(w)
            groups = _groups(self.perturbations, indices, w, place)
            if not groups:
                continue
            crop = self.objective.image[_rows(slice(None), place)].to(device)
            for group in groups:
                if not self.mine():
                    continue
                perturbed = self.perturbations.apply(group[0], crop, place)
                if not torch.equal(perturbed, crop):
                    yield _Pair(group, w), plan.pad(perturbed)

    def mine(self) -> bool:
        """Whether this process computes the next pair."""
        return True

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        """Network passes for one batch of pairs, and their booking."""
        raise NotImplementedError

    def over(self, indices: Sequence[int]) -> None:
        """All pairs of these perturbations, in full batches."""
        pending: list[tuple[_Pair, Tensor]] = []
        for item in self.pairs(indices):
            pending.append(item)
            if len(pending) >= self.objective.window_batch:
                pending = self._flush(pending)
        while pending:
            pending = self._flush(pending)

    def _flush(self, pending: list[tuple[_Pair, Tensor]]) -> list[tuple[_Pair, Tensor]]:
        self.objective.monitor.check()
        part = pending[: self.objective.window_batch]
        try:
            self.compute([p for p, _ in part], [x for _, x in part])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.objective.shrink(len(part), error)
            return pending
        return pending[len(part) :]

    def forward(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode():
            return self.objective.run(torch.stack(list(windows)), [p.window for p in pairs])


class _LinearChange(_Change):
    """Scores of windows add up: cached unperturbed scores, and sums in float64."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        super().__init__(objective, perturbations)
        self.cotangents: dict[tuple[int, ...], list[Tensor | None]] = {}
        self.number = 0

    def mine(self) -> bool:
        """Pairs go round the processes."""
        ranks = self.objective.ranks
        self.number += 1
        return self.number % ranks.size == ranks.rank

    def run(self) -> Tensor:
        self._base()
        with self.objective.ranks.summed([self.result]):
            self.over(range(len(self.perturbations)))
        return self.result

    def _base(self) -> None:
        known = self.objective.base_scores
        missing = [w for w in self.objective.windows if w not in known]
        found = torch.zeros((len(missing), self.objective.n_targets), dtype=torch.float64)

        def score(batch: Batch) -> None:
            with torch.inference_mode():
                scores = batch.scores(batch.forward(batch.image)).cpu()
            for w, one in zip(batch.windows, scores.T):
                found[missing.index(w)] += one

        self.objective.each([(0, w) for w in missing], score, sums=[found])
        known.update(zip(missing, found))

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        out = self.forward(pairs, windows)
        needed = list(dict.fromkeys(p.window for p in pairs))
        rows = torch.tensor([needed.index(p.window) for p in pairs], device=out.device)
        changes = torch.zeros((self.objective.n_targets, len(pairs)), dtype=torch.float64)
        for k, cotangent in enumerate(self._cotangents_of(needed)):
            if cotangent is not None:
                changes[k] = (out * cotangent[rows]).flatten(1).sum(1, dtype=torch.float64).cpu()
        changes -= torch.stack([self.objective.base_scores[p.window] for p in pairs], 1)
        for pair, row in zip(pairs, changes.T):
            self.result[:, list(pair.indices)] += row[:, None]

    def _cotangents_of(self, windows: Sequence[int]) -> list[Tensor | None]:
        key = tuple(windows)
        if key not in self.cotangents:  # windows come in order, so that only the last set can come again
            self.cotangents = {key: self.objective.cotangents(windows)}
        return self.cotangents[key]


class _BlendedChange(_Change):
    """Non-linear scores: ΔP is blended on the box of each score, for a block of perturbations at a time."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        super().__init__(objective, perturbations)
        self.predictions = [p.double() for p in objective.image_predictions()]
        self.values = torch.stack([s.value(p) for s, p in zip(objective.scores, self.predictions)])
        self.base: dict[int, Tensor] = {}
        self.base_bytes = 0
        self.block = _block_size(objective, len(perturbations))

    def run(self) -> Tensor:
        ranks = self.objective.ranks
        with ranks.summed([self.result]):
            self._blocks(ranks.share(range(len(self.perturbations))))
        return self.result

    def _blocks(self, mine: Sequence[int]) -> None:
        for start in range(0, len(mine), self.block):
            indices = mine[start : start + self.block]
            self.position = {i: j for j, i in enumerate(indices)}
            self.delta = [p.new_zeros((len(indices), *p.shape)) for p in self.predictions]
            self.over(indices)
            for k, (score, p, d) in enumerate(zip(self.objective.scores, self.predictions, self.delta)):
                for j, i in enumerate(indices):
                    if bool(d[j].any()):
                        self.result[k, i] = (score.value(p + d[j]) - self.values[k]).cpu()

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        out = self.forward(pairs, windows)
        base = self._unperturbed(list(dict.fromkeys(p.window for p in pairs)))
        objective = self.objective
        for j, pair in enumerate(pairs):
            difference = out[j].double() - base[pair.window].to(out.device).double()
            weighted = difference * objective.grid.weight(pair.window).to(out.device).double()
            weighted = weighted.to(self.predictions[0].device)  # once, for all perturbations that share the pair
            for score, rows, support, delta in zip(objective.scores, objective.rows, objective.support, self.delta):
                if pair.window in support:
                    for index in pair.indices:
                        place = delta[self.position[index]]
                        objective.grid.add(place, score.box, pair.window, weighted[rows])

    def _unperturbed(self, windows: Sequence[int]) -> dict[int, Tensor]:
        missing = [w for w in windows if w not in self.base]
        if missing:
            crops = torch.stack([self.objective.plan.cut(self.objective.image, w) for w in missing])
            with torch.inference_mode():
                out = self.objective.run(crops.to(self.objective.model.device), missing).cpu()
            needed = out[0].numel() * out.element_size()
            if self.base_bytes + needed * len(missing) > BLOCK_BYTES:
                keep = {w: self.base[w] for w in windows if w in self.base}
                self.base, self.base_bytes = keep, needed * len(keep)
            for w, o in zip(missing, out):
                self.base[w] = o.clone()
                self.base_bytes += needed
        return {w: self.base[w] for w in windows}
