"""``F(x') − F(x)`` for many perturbations of one volume, recomputing only the windows that each one touches.

    linear s:      F(x') − F(x) = Σ_touched (F_w(x'_w) − F_w(x_w))
    non-linear s:  ΔP = Σ_touched ĝ_w (f(x'_w) − f(x_w)) on the support of s,   F(x') − F(x) = s(P + ΔP) − s(P)

A perturbation says what it changes; it never holds a copy of the volume. (perturbation, window) pairs of different
windows share batches; a pair that changes no voxel is never computed, and perturbations that are equal inside a window
share one pass of it.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.errors import MethodTimeout
from esegeta_monai.objective import Batch, Objective, out_of_memory
from esegeta_monai.windows import Slices

__all__ = [
    "UNCHANGED",
    "Added",
    "Boxes",
    "Perturbations",
    "Sampled",
    "change",
    "digest",
    "known_change",
    "known_passes",
]
__all__ += ["passes_needed"]

BLOCK_BYTES = 256 * 2**20
"""Memory for the ΔP of the perturbations in flight and, beside it, for cached unperturbed outputs (non-linear s)."""

BLOCK = 512
"""Perturbations in flight at most (non-linear s): after each block their scores are known, and can be kept."""

LOOKED_AT = 8
"""Perturbations of a window that are looked at for one that changes it, before fewer are sampled."""

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

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        """Whether perturbation ``index`` changes a voxel of ``crop`` (C, *place): what does not is never computed."""
        return self.altered(index, crop, place) is not None

    def altered(self, index: int, crop: Tensor, place: Slices) -> Tensor | None:
        """`apply`, or None where no voxel of ``crop`` is changed."""
        perturbed = self.apply(index, crop, place)
        return None if torch.equal(perturbed, crop) else perturbed

    def reaching(self, place: Slices) -> Sequence[int]:
        """The perturbations that may change a voxel at ``place``, in order."""
        return range(len(self))

    def key(self, index: int, window: int, place: Slices) -> Hashable | None:
        """What determines the perturbed window, so that equal ones are computed once; None: always computed.

        `UNCHANGED` says that nothing of the window is changed: then it is not even looked at.
        """
        return None

    def identity(self, index: int) -> Hashable | None:
        """What determines the whole perturbation, for `known_change`; None: nothing else is ever equal to it."""
        return None

    def fingerprint(self) -> str | None:
        """A hash of all of them, under which their scores are kept on disk; None: they are not kept."""
        names = [self.identity(i) for i in range(len(self))]
        return None if None in names else hashlib.sha256(repr(names).encode()).hexdigest()

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

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        return self.whole.changes(self.indices[index], crop, place)

    def altered(self, index: int, crop: Tensor, place: Slices) -> Tensor | None:
        return self.whole.altered(self.indices[index], crop, place)

    def reaching(self, place: Slices) -> Sequence[int]:
        near = set(self.whole.reaching(place))
        return [j for j, i in enumerate(self.indices) if i in near]

    def key(self, index: int, window: int, place: Slices) -> Hashable | None:
        return self.whole.key(self.indices[index], window, place)

    def identity(self, index: int) -> Hashable | None:
        return self.whole.identity(self.indices[index])

    def fingerprint(self) -> str | None:
        whole = self.whole.fingerprint()
        return None if whole is None else hashlib.sha256(f"{whole}{self.indices}".encode()).hexdigest()


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
        self._corners = np.array([starts, stops], dtype=int)
        self._digest: bytes | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def reaching(self, place: Slices) -> Sequence[int]:
        if not self.boxes:
            return []
        starts, stops = self._corners
        meet = (starts < [p.stop for p in place]) & (stops > [p.start for p in place])
        return np.flatnonzero(meet.all(1)).tolist()

    def identity(self, index: int) -> Hashable:
        if self._digest is None:
            self._digest = digest(torch.as_tensor(self.baseline))
        rows = None if self.channels is None else tuple(self.channels[index])
        return self._digest, rows, tuple((b.start, b.stop) for b in self.boxes[index])

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        inside, value = self._replaced(index, crop, place)
        perturbed = crop.clone()
        perturbed[inside] = value
        return perturbed

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        inside, value = self._replaced(index, crop, place)
        return bool((crop[inside] != value).any())  # the box alone, not the whole window

    def altered(self, index: int, crop: Tensor, place: Slices) -> Tensor | None:
        return self.apply(index, crop, place) if self.changes(index, crop, place) else None

    def fingerprint(self) -> str:
        baseline = self.baseline if isinstance(self.baseline, Tensor) else torch.tensor(self.baseline)
        parts = digest(torch.from_numpy(self._corners), baseline).hex()
        return hashlib.sha256(f"{parts}{self.channels}".encode()).hexdigest()

    def _replaced(self, index: int, crop: Tensor, place: Slices) -> tuple[tuple[Any, ...], Tensor | float]:
        """The part of the crop that lies in the box, and what stands there afterwards."""
        common = [slice(max(b.start, p.start), min(b.stop, p.stop)) for b, p in zip(self.boxes[index], place)]
        inside = tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(common, place))
        rows = slice(None) if self.channels is None else list(self.channels[index])
        value = self.baseline
        if isinstance(value, Tensor):
            value = value[_rows(rows, common)].to(crop.device, crop.dtype)
        return _rows(rows, inside), value


class Added(Perturbations):
    """Whole volumes added: ``x' = x + δ``.

    Args:
        deltas: (m, C, *spatial).
    """

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.deltas)

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        return crop + self.deltas[index][_rows(slice(None), place)].to(crop)

    def identity(self, index: int) -> Hashable:
        if index not in self._digests:
            self._digests[index] = digest(self.deltas[index])
        return "added", self._digests[index]


def digest(*tensors: Tensor) -> bytes:
    """SHA-256 over shapes and bytes."""
    found = hashlib.sha256()
    for t in tensors:
        found.update(str(tuple(t.shape)).encode())
        found.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def _rows(channels: Any, place: Sequence[slice]) -> tuple[Any, ...]:
    return (channels, *place)


@dataclass(frozen=True)
class _Pair:
    """One perturbed window, and all perturbations that are equal there."""

    indices: tuple[int, ...]
    window: int

    @property
    def first(self) -> int:
        """The perturbation that stands for all."""
        return self.indices[0]


class Sampled(Exception):  # noqa: N818 - reads as what happened
    """Ends a method of which only some scores are wanted, see `Objective.first_windows`.

    Args:
        scores: (k, n).
    """

    def __init__(self, scores: Tensor) -> None:
        super().__init__(f"{scores.shape[1]} perturbations were scored")
        self.scores = scores


def change(objective: Objective, perturbations: Perturbations) -> Tensor:
    """``F(x') − F(x)`` for every perturbation and target: (k, m), float64, on the CPU.

    Batches hold ``objective.window_batch`` pairs; where memory runs out they are halved.

    Raises:
        Sampled: the objective is one of `Objective.first_windows`.
    """
    if objective.sample is not None:
        whole = copy.copy(objective)
        whole.sample = None
        raise Sampled(change(whole, perturbations.take(_sample(objective, perturbations, objective.sample))))
    if objective.linear:
        return _LinearChange(objective, perturbations).run()
    return _BlendedChange(objective, perturbations).run()


def _sample(objective: Objective, perturbations: Perturbations, n: int) -> list[int]:
    """At most n perturbations for each window, drawn from those that change a voxel of it."""
    chosen: set[int] = set()
    generator = objective.generator()
    for w in objective.windows:
        place = objective.plan.place(w)
        crop = objective.image[_rows(slice(None), place)].to(objective.model.device)
        near = perturbations.reaching(place)
        order = torch.randperm(len(near), generator=generator).tolist()[: LOOKED_AT * n]
        changing = (near[j] for j in order if perturbations.changes(near[j], crop, place))
        chosen.update(itertools.islice(changing, n))
    return sorted(chosen)


def known_change(objective: Objective, perturbations: Perturbations) -> Tensor:
    """`change`, where a perturbation that any method has scored on this objective before is looked up: (k, m)."""
    table = _TABLES.setdefault(objective, {})
    names, first = _unknown(objective, perturbations)
    found = change(objective, perturbations.take(first))
    columns = {i: j for j, i in enumerate(first)}
    for i, j in columns.items():
        if (name := names[i]) is not None:
            table[name] = found[:, j].clone()
    rows = [found[:, columns[i]] if name is None else table[name] for i, name in enumerate(names)]
    return torch.stack(rows, 1) if rows else found


def known_passes(objective: Objective, perturbations: Perturbations) -> int:
    """Window passes that `known_change` needs; no network runs."""
    return passes_needed(objective, perturbations.take(_unknown(objective, perturbations)[1]))


def _unknown(objective: Objective, perturbations: Perturbations) -> tuple[list[Hashable | None], list[int]]:
    """The identities of perturbations, and the first of each that has not been scored yet."""
    table = _TABLES.get(objective, {})
    names = [perturbations.identity(i) for i in range(len(perturbations))]
    first: dict[Hashable, int] = {}
    for i, name in enumerate(names):
        if name is None or name not in table:
            first.setdefault(i if name is None else (name,), i)
    return names, list(first.values())


_TABLES: WeakKeyDictionary[Objective, dict[Hashable, Tensor]] = WeakKeyDictionary()
"""Scores by objective and `Perturbations.identity`: shared by the methods that run on one objective."""


def passes_needed(objective: Objective, perturbations: Perturbations) -> int:
    """Window passes that `change` needs; perturbed windows are looked at for that, but no network runs."""
    m, windows = len(perturbations), objective.windows
    block = m if objective.linear else _block_size(objective, m)
    blocks = [range(a, min(a + block, m)) for a in range(0, m, max(block, 1))]
    touched = [
        [
            pair.window
            for pair, crop, place in _pairs(objective, perturbations, b)
            if perturbations.changes(pair.first, crop, place)
        ]
        for b in blocks
    ]
    pairs = sum(map(len, touched))
    if objective.linear:
        return pairs + len(windows)
    unperturbed = [set(part) for part in touched]
    if _keeps(objective):
        unperturbed = [set().union(*unperturbed)]
    blending = len(windows) if objective.prediction is None else 0
    return pairs + sum(map(len, unperturbed)) + blending


def _keeps(objective: Objective) -> bool:
    """Whether the unperturbed outputs of all windows fit in `BLOCK_BYTES`."""
    size = len(objective.read) * math.prod(objective.grid.out_roi) * objective.image.element_size()
    return len(objective.windows) * size <= BLOCK_BYTES


def _pairs(
    objective: Objective, perturbations: Perturbations, block: Sequence[int]
) -> Iterator[tuple[_Pair, Tensor, Slices]]:
    """All pairs of a block of perturbations that may change a voxel, each with the window (C, *place) and its place.

    Windows are outside, perturbations inside, so that a window is cut once.
    """
    for w in objective.windows:
        place = objective.plan.place(w)
        groups = _groups(perturbations, block, w, place)
        if groups:
            crop = objective.image[_rows(slice(None), place)].to(objective.model.device)
            for group in groups:
                yield _Pair(group, w), crop, place


def _groups(perturbations: Perturbations, block: Sequence[int], window: int, place: Slices) -> list[tuple[int, ...]]:
    """The perturbations that may change a window, those that are equal there together."""
    groups: dict[Hashable, list[int]] = {}
    wanted = block if isinstance(block, range) else set(block)
    for i in perturbations.reaching(place):
        if i not in wanted:
            continue
        key = perturbations.key(i, window, place)
        if key != UNCHANGED:
            groups.setdefault(("alone", i) if key is None else ("key", key), []).append(i)
    return [tuple(g) for g in groups.values()]


def _block_size(objective: Objective, m: int) -> int:
    """How many ΔP fit in `BLOCK_BYTES`, at most `BLOCK`."""
    size = sum(len(s.channels) * math.prod(b.stop - b.start for b in s.box) * 8 for s in objective.scores)
    return max(1, min(m, BLOCK, BLOCK_BYTES // max(size, 1)))


class _Change:
    """What both kinds share: pairs in full batches."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        self.objective, self.perturbations = objective, perturbations
        self.result = torch.zeros((objective.n_targets, len(perturbations)), dtype=torch.float64)
        self.done = self.number = self.known = 0
        table = objective.table if objective.ranks.size == 1 else None
        self.name = None if table is None else perturbations.fingerprint()
        self.table = None if self.name is None else table
        if self.table is not None and self.name is not None:
            known = self.table.read(self.name, tuple(self.result.shape))
            if known is not None:
                self.result, self.done = known

    def keep(self, *, force: bool = False) -> None:
        """Writes down the scores so far, which stand for ``done`` pairs or perturbations."""
        if self.table is not None and self.name is not None:
            self.table.write(self.name, self.result, self.done, force=force)

    def mine(self) -> bool:
        """Whether this process computes the next pair."""
        return True

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        """Network passes for one batch of pairs, and their booking."""
        raise NotImplementedError

    def over(self, block: Sequence[int]) -> None:
        """All pairs of these perturbations, in full batches."""
        pending: list[tuple[_Pair, Tensor]] = []
        for pair, crop, place in _pairs(self.objective, self.perturbations, block):
            if not self.mine():
                continue
            perturbed = self.perturbations.altered(pair.first, crop, place)
            if perturbed is None:
                continue
            self.number += 1
            if self.number <= self.known:  # of an earlier run: pairs come in the same order at every run
                continue
            pending.append((pair, self.objective.plan.pad(perturbed)))
            if len(pending) >= self.objective.window_batch:
                pending = self._flush(pending)
        while pending:
            pending = self._flush(pending)

    def _flush(self, pending: list[tuple[_Pair, Tensor]]) -> list[tuple[_Pair, Tensor]]:
        try:
            self.objective.monitor.check()
        except MethodTimeout:
            self.keep(force=True)
            raise
        self.keep()
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
        self.turn = 0

    def mine(self) -> bool:
        """Pairs go round the processes."""
        self.turn += 1
        return self.turn % self.objective.ranks.size == self.objective.ranks.rank

    def run(self) -> Tensor:
        self.known = self.done
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
        self.done += len(pairs)

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
        self.block, self.keeps = _block_size(objective, len(perturbations)), _keeps(objective)

    def run(self) -> Tensor:
        ranks = self.objective.ranks
        with ranks.summed([self.result]):
            self._blocks(ranks.share(range(len(self.perturbations))))
        return self.result

    def _blocks(self, mine: Sequence[int]) -> None:
        for start in range(self.done, len(mine), self.block):
            indices = mine[start : start + self.block]
            self.base = self.base if self.keeps else {}
            self.position = {i: j for j, i in enumerate(indices)}
            self.delta = [p.new_zeros((len(indices), *p.shape)) for p in self.predictions]
            self.over(indices)
            for k, (score, p, d) in enumerate(zip(self.objective.scores, self.predictions, self.delta)):
                for j, i in enumerate(indices):
                    if bool(d[j].any()):
                        self.result[k, i] = (score.value(p + d[j]) - self.values[k]).cpu()
            self.done += len(indices)
            self.keep()

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
            if not self.keeps:
                self.base = {w: self.base[w] for w in windows if w in self.base}
            self.base.update({w: o.clone() for w, o in zip(missing, out)})
        return {w: self.base[w] for w in windows}
