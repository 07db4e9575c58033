"""``F(x') − F(x)`` for many perturbations of one volume, recomputing only the windows that each one touches.

    linear s:      F(x') − F(x) = Σ_touched (F_w(x'_w) − F_w(x_w))
    non-linear s:  ΔP = Σ_touched ĝ_w (f(x'_w) − f(x_w)) on the mask of s,   F(x') − F(x) = s(P + ΔP) − s(P)

(perturbation, window) pairs of different windows share batches; a pair that changes no voxel is never computed, and
perturbations that are equal inside a window share one pass of it. Of a window's output a linear s looks at the box of
its mask, another one at the mask's voxels (`esegeta_monai.support`), and where that one is a sum over voxels only at
those that the touched windows hold.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from esegeta_monai.errors import MethodTimeout
from esegeta_monai.objective import Batch, Objective, out_of_memory
from esegeta_monai.pace import Loop
from esegeta_monai.perturbation import UNCHANGED, Perturbations
from esegeta_monai.support import Held, Support
from esegeta_monai.targets.base import take, true_positions
from esegeta_monai.windows import Slices, last_axes

__all__ = ["Sampled", "change", "known_change", "known_passes", "passes_needed"]

BLOCK_BYTES = 256 * 2**20
"""Memory for the changed outputs of the perturbations in flight and, beside it, for unperturbed outputs, which the
objective keeps where all fit (non-linear s)."""

BLOCK = 512
"""Perturbations in flight at most (non-linear s): after each block their scores are known, and can be kept."""

LOOKED_AT = 8
"""Perturbations of a window that are looked at for one that changes it, before fewer are sampled."""


@dataclass(frozen=True)
class _Pair:
    """One perturbed window, and all perturbations that are equal there."""

    indices: tuple[int, ...]
    window: int

    @property
    def first(self) -> int:
        """The perturbation that stands for all."""
        return self.indices[0]


Block = Iterable[tuple[int, list[tuple[int, ...]]]]
"""Pairs, window by window: for each window the perturbations that are equal there together."""


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
        crop = objective.image[last_axes(place)].to(objective.model.device)
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


def known_passes(objective: Objective, *rounds: Perturbations) -> int:
    """Window passes that `known_change` needs for one set of perturbations after the other; no network runs."""
    return passes_needed(objective, *(p.take(_unknown(objective, p)[1]) for p in rounds))


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


def passes_needed(objective: Objective, *rounds: Perturbations) -> int:
    """Window passes that `change` needs for one set of perturbations after the other, on an objective of which nothing
    has been computed yet; perturbed windows are looked at for that, but no network runs."""
    unperturbed = len(objective.windows) if objective.linear or objective.prediction is None else 0
    known: set[int] = set()
    return unperturbed + sum(_pair_passes(objective, p, known) for p in rounds)


def _pair_passes(objective: Objective, perturbations: Perturbations, known: set[int]) -> int:
    """Window passes of all pairs, and of what they are compared with (non-linear s) where that is not ``known``; it is
    afterwards."""

    def touched(block: Block) -> list[int]:
        """The windows of all pairs that change a voxel."""
        pairs = _pairs(objective, block)
        return [pair.window for pair, crop, place in pairs if perturbations.changes(pair.first, crop, place)]

    if objective.linear:
        return len(touched(_by_window(objective, perturbations)))
    sizes = _sizes(objective, _supports(objective))
    parts = [touched(b) for _, b in _blocks(objective, perturbations, range(len(perturbations)), sizes)]
    unperturbed = [set(part) for part in parts]
    if _keeps(sizes):
        unperturbed = [set().union(*unperturbed) - known]
        known |= unperturbed[0]
    return sum(map(len, parts)) + sum(map(len, unperturbed))


def _supports(objective: Objective) -> list[Support]:
    return [Support(objective, k) for k in range(objective.n_targets)]


def _pairs(objective: Objective, block: Block) -> Iterator[tuple[_Pair, Tensor, Slices]]:
    """All pairs of a block, each with the window (C, *place) and its place; a window is cut once."""
    for w, groups in block:
        place = objective.plan.place(w)
        crop = objective.image[last_axes(place)].to(objective.model.device)
        for group in groups:
            yield _Pair(group, w), crop, place


def _by_window(objective: Objective, perturbations: Perturbations) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """All perturbations as one block, found as it is asked for."""
    for w in objective.windows:
        place = objective.plan.place(w)
        groups: dict[Hashable, list[int]] = {}
        for i, key in _keys(perturbations, perturbations.reaching(place), w, place):
            groups.setdefault(key, []).append(i)
        if groups:
            yield w, [tuple(g) for g in groups.values()]


def _keys(
    perturbations: Perturbations, indices: Sequence[int], window: int, place: Slices
) -> Iterator[tuple[int, Hashable]]:
    """Perturbations that may change a window, and their `Perturbations.keys`: one of its own where there is none."""
    for i, key in zip(indices, perturbations.keys(indices, window, place)):
        if key != UNCHANGED:
            yield i, ("alone", i) if key is None else ("key", key)


def _blocks(
    objective: Objective, perturbations: Perturbations, indices: Sequence[int], sizes: Mapping[int, int]
) -> Iterator[tuple[list[int], Block]]:
    """As many perturbations at a time as `BLOCK` and `BLOCK_BYTES` of changed outputs allow, and their pairs."""
    members: list[int] = []
    groups: dict[int, dict[Hashable, list[int]]] = {w: {} for w in objective.windows}
    total = 0

    def block() -> tuple[list[int], Block]:
        return members, [(w, [tuple(g) for g in found.values()]) for w, found in groups.items() if found]

    for i, keys in _keyed(objective, perturbations, indices):
        new = sum(sizes[w] for w, key in keys.items() if key not in groups[w])
        if members and (len(members) == BLOCK or total + new > BLOCK_BYTES):
            yield block()
            members, groups, total = [], {w: {} for w in objective.windows}, 0
            new = sum(sizes[w] for w in keys)
        members.append(i)
        total += new
        for w, key in keys.items():
            groups[w].setdefault(key, []).append(i)
    if members:
        yield block()


def _keyed(
    objective: Objective, perturbations: Perturbations, indices: Sequence[int]
) -> Iterator[tuple[int, dict[int, Hashable]]]:
    """Each perturbation with its keys in the windows that it may change, `BLOCK` perturbations looked at together."""
    places = {w: objective.plan.place(w) for w in objective.windows}
    reaching = {w: perturbations.reaching(place) for w, place in places.items()}
    near = {w: found if isinstance(found, range) else set(found) for w, found in reaching.items()}
    for start in range(0, len(indices), BLOCK):
        some: dict[int, dict[int, Hashable]] = {i: {} for i in indices[start : start + BLOCK]}
        for w, place in places.items():
            for i, key in _keys(perturbations, [i for i in some if i in near[w]], w, place):
                some[i][w] = key
        yield from some.items()


def _sizes(objective: Objective, supports: Sequence[Support]) -> dict[int, int]:
    """Bytes of each window's output at the masks' voxels."""
    item = objective.image.element_size()
    return {
        w: sum(s.count(w) * len(s.score.channels) * item for s in supports if w in s.windows) for w in objective.windows
    }


def _keeps(sizes: Mapping[int, int]) -> bool:
    """Whether the unperturbed outputs of all windows fit in `BLOCK_BYTES`."""
    return sum(sizes.values()) <= BLOCK_BYTES


class _Change:
    """What both kinds share: pairs in full batches."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        self.objective, self.perturbations = objective, perturbations
        self.result = torch.zeros((objective.n_targets, len(perturbations)), dtype=torch.float64)
        self.done = self.number = self.known = 0
        self.loop: Loop | None = None
        self.began, self.ended, self.compared = 0, False, set[int]()
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

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Where the method is only timed (`esegeta_monai.pace`), not all pairs inside are computed."""
        pace = self.objective.monitor.pace
        if pace is None:
            yield
            return
        self.began, self.loop = self.objective.monitor.passes, pace.loop("perturbations")
        self.compared = set(self.objective.base_outputs)
        yield
        self.loop.end(self._passes(), self._all_passes)

    def _all_passes(self) -> int:
        """Window passes of all pairs."""
        if not self.ended:
            return self._passes()
        found = _pair_passes(self.objective, self.perturbations, self.compared)
        for window in self.compared:
            self.objective.base_outputs.setdefault(window)
        return math.ceil(found / self.objective.ranks.size)

    def _passes(self) -> int:
        """Window passes of the pairs so far."""
        return self.objective.monitor.passes - self.began

    def mine(self) -> bool:
        """Whether this process computes the next pair."""
        return True

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        """Network passes for one batch of pairs, and their booking: all of it, or none where memory runs out."""
        raise NotImplementedError

    def over(self, block: Block) -> None:
        """All pairs of a block, in full batches."""
        pending: list[tuple[_Pair, Tensor]] = []
        for pair, crop, place in _pairs(self.objective, block):
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
                if self.ended:
                    return
        while pending and not self.ended:
            pending = self._flush(pending)

    def _flush(self, pending: list[tuple[_Pair, Tensor]]) -> list[tuple[_Pair, Tensor]]:
        if self.loop is not None and self.loop.enough(self._passes()):
            self.ended = True
            return []
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

    def forward(self, windows: Sequence[int], x: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.objective.run(x, windows)


def _runs(windows: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each window of a batch and its place there; equal ones are neighbours."""
    start = 0
    for w, same in itertools.groupby(windows):
        stop = start + len(list(same))
        yield w, slice(start, stop)
        start = stop


class _LinearChange(_Change):
    """Scores of windows add up: cached unperturbed scores, and sums in float64."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        super().__init__(objective, perturbations)
        self.weights: dict[int, list[tuple[Slices, Tensor] | None]] = {}
        self.turn = 0

    def mine(self) -> bool:
        """Pairs go round the processes."""
        self.turn += 1
        return self.turn % self.objective.ranks.size == self.objective.ranks.rank

    def run(self) -> Tensor:
        self.known = self.done
        self._base()
        with self.timed(), self.objective.ranks.summed([self.result]):
            self.over(_by_window(self.objective, self.perturbations))
        return self.result

    def _base(self) -> None:
        known = self.objective.base_scores
        missing = [w for w in self.objective.windows if w not in known]
        found = torch.zeros((len(missing), self.objective.n_targets), dtype=torch.float64)
        rows = {w: row for row, w in enumerate(missing)}

        def score(batch: Batch) -> None:
            with torch.inference_mode():
                scores = self.scores(batch.windows, batch.forward(batch.image))
            found[[rows[w] for w in batch.windows]] = scores.T

        self.objective.each([(0, w) for w in missing], score, with_cotangents=False, sums=[found])
        known.update(zip(missing, found))

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        where = [p.window for p in pairs]
        changes = self.scores(where, self.forward(where, torch.stack(list(windows))))
        changes -= torch.stack([self.objective.base_scores[w] for w in where], 1)
        result = self.result.numpy()  # its own memory: to add to few places is dear in torch
        for pair, column in zip(pairs, changes.numpy().T):
            result[:, pair.indices] += column[:, None]
        self.done += len(pairs)

    def scores(self, windows: Sequence[int], out: Tensor) -> Tensor:
        """``F_w`` (k, n) from network output (n, R, *out_roi)."""
        found = out.new_zeros((self.objective.n_targets, len(out)), dtype=torch.float64)
        for w, rows in _runs(windows):
            for k, weighted in enumerate(self._weights_of(w)):
                if weighted is not None:
                    inside, weight = weighted
                    seen = out[rows][:, self.objective.rows[k]][last_axes(inside)]
                    found[k, rows] = seen.flatten(1).double() @ weight.to(out.device)
        return found.cpu()

    def _weights_of(self, window: int) -> list[tuple[Slices, Tensor] | None]:
        """For each score the box of its mask in a window's output, and ``ĝ_w ∂s/∂P`` there as a vector in float64; None
        where it sees none of the window."""
        if window not in self.weights:
            held = sum(w[1].nbytes for known in self.weights.values() for w in known if w is not None)
            if held > BLOCK_BYTES:  # windows come in order, so that only the last one can come again
                self.weights.clear()
            self.weights[window] = [
                self._weight(k, window) if window in support else None
                for k, support in enumerate(self.objective.support)
            ]
        return self.weights[window]

    def _weight(self, k: int, window: int) -> tuple[Slices, Tensor]:
        inside, weight = self.objective.weighted_cotangent(k, window)
        channels = len(self.objective.scores[k].channels)
        return inside, weight.double().expand(channels, *weight.shape[1:]).flatten()


class _BlendedChange(_Change):
    """Non-linear scores: what each window changes at the masks' voxels is kept until all windows of a perturbation are
    known; then ΔP is blended and scored."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        super().__init__(objective, perturbations)
        self.supports = _supports(objective)
        self.sizes = _sizes(objective, self.supports)
        self.keeps = _keeps(self.sizes)
        self._held: dict[int, list[Held | None]] = {}
        self.before = [s.of(p) for s, p in zip(self.supports, objective.image_predictions())]
        self.terms = [s.score.terms(p) if s.score.additive else None for s, p in zip(self.supports, self.before)]
        self.delta = [torch.zeros_like(p, dtype=objective.image.dtype) for p in self.before]
        self.after = [torch.empty_like(p) for p in self.before]
        self.base: dict[int, list[Tensor | None] | None] = objective.base_outputs if self.keeps else {}
        self.parts: dict[int, list[list[tuple[Held, Tensor] | None]]] = {}

    def run(self) -> Tensor:
        ranks = self.objective.ranks
        with self.timed(), ranks.summed([self.result]):
            mine = ranks.share(range(len(self.perturbations)))[self.done :]
            for indices, block in _blocks(self.objective, self.perturbations, mine, self.sizes):
                self.base = self.base if self.keeps else {}
                self.parts = {i: [] for i in indices}
                before = self.number
                self.over(block)
                if self.ended:  # scores take time too: as many as the pairs would be
                    pairs = sum(len(groups) for _, groups in block)
                    for i in indices[: math.ceil(len(indices) * (self.number - before) / pairs)]:
                        self._score(i)
                    break
                for i in indices:
                    self._score(i)
                self.done += len(indices)
                self.keep()
        return self.result

    def held(self, window: int) -> list[Held | None]:
        """For each score which of its voxels a window holds, None where it sees none of the window."""
        if window not in self._held:
            if not self.keeps:  # windows come in order, so that only the last one can come again
                self._held.clear()
            self._held[window] = [s.held(window) if window in s.windows else None for s in self.supports]
        return self._held[window]

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        where = [p.window for p in pairs]
        base = self._unperturbed(list(dict.fromkeys(where)))
        out = self.forward(where, torch.stack(list(windows)))
        changed: list[list[tuple[Held, Tensor] | None]] = [[] for _ in pairs]
        for w, rows in _runs(where):
            for held, seen, unchanged in zip(self.held(w), self._read(out[rows], w), base[w]):
                found = None if seen is None or unchanged is None or held is None else (seen - unchanged) * held.weight
                for j, one in enumerate(changed[rows]):
                    one.append(None if found is None or held is None else (held, found[j]))
        for pair, one in zip(pairs, changed):
            for i in pair.indices:
                self.parts[i].append(one)

    def _read(self, out: Tensor, window: int) -> list[Tensor | None]:
        """For each score what it sees of a window's outputs (n, R, *out_roi): (n, channels, m), where volumes live."""
        device = self.objective.image.device
        return [None if h is None else s.read(out, h).to(device) for s, h in zip(self.supports, self.held(window))]

    def _unperturbed(self, windows: Sequence[int]) -> dict[int, list[Tensor | None]]:
        missing = [w for w in windows if self.base.get(w) is None]
        if missing:
            crops = torch.stack([self.objective.plan.cut(self.objective.image, w) for w in missing])
            out = self.forward(missing, crops.to(self.objective.model.device))
            if not self.keeps:
                self.base = {w: self.base[w] for w in windows if w in self.base}
            for j, w in enumerate(missing):
                self.base[w] = [None if s is None else s[0].clone() for s in self._read(out[j : j + 1], w)]
        return {w: kept for w in windows if (kept := self.base[w]) is not None}

    def _score(self, index: int) -> None:
        """``s(P + ΔP) − s(P)`` of one perturbation, from what its windows changed."""
        parts = self.parts.pop(index)
        for k, delta in enumerate(self.delta):
            changed = [seen[k] for seen in parts]
            touched = [part for part in changed if part is not None]
            if touched:
                for held, part in touched:
                    delta.index_add_(1, held.voxels, part)
                self.result[k, index] = self._difference(k, [held for held, _ in touched])
                delta.zero_()

    def _difference(self, k: int, touched: Sequence[Held]) -> float:
        support, before, delta, terms = self.supports[k], self.before[k], self.delta[k], self.terms[k]
        score = support.score
        if terms is None:
            return float(score.value(support.box(before + delta)) - score.value(support.box(before)))
        if sum(len(held.voxels) for held in touched) >= support.n:  # about all of them: to pick them would cost more
            return float((score.terms(torch.add(before, delta, out=self.after[k])) - terms).sum())
        here = torch.zeros(support.n, dtype=torch.bool, device=delta.device)
        for held in touched:
            here[held.voxels] = True
        at = true_positions(here)
        return float((score.terms(take(before, at) + take(delta, at)) - take(terms, at)).sum())
