"""``F(x') − F(x)`` for many perturbations of one volume, recomputing only the windows that each one touches.

    linear s:      F(x') − F(x) = Σ_touched (F_w(x'_w) − F_w(x_w))
    non-linear s:  ΔP = Σ_touched ĝ_w (f(x'_w) − f(x_w)) on the support of s,   F(x') − F(x) = s(P + ΔP) − s(P)

A perturbation says what it changes; it never holds a copy of the volume. (perturbation, window) pairs of different
windows share batches; a pair that changes no voxel is never computed, and neither is a pair whose part inside the
window has been computed before.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.objective import Batch, Objective, out_of_memory
from esegeta_monai.windows import Slices, _overlap

__all__ = ["Boxes", "Perturbations", "change", "passes_needed"]

BLOCK_BYTES = 256 * 2**20
"""Memory for the ΔP of the perturbations in flight and, beside it, for cached unperturbed outputs (non-linear s)."""


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
        """What determines the perturbed window, so that equal ones are computed once; None: always computed."""
        return None


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
    index: int
    window: int
    key: Hashable | None


def change(objective: Objective, perturbations: Perturbations) -> Tensor:
    """``F(x') − F(x)`` for every perturbation and target: (k, m), float64, on the CPU.

    Batches hold ``objective.window_batch`` pairs; where memory runs out they are halved.
    """
    if objective.linear:
        return _LinearChange(objective, perturbations).run()
    return _BlendedChange(objective, perturbations).run()


def passes_needed(objective: Objective, perturbations: Perturbations) -> int:
    """Window passes that `change` needs at most (pairs that change no voxel are found only while running)."""
    places = {w: objective.plan.place(w) for w in objective.windows}
    pairs = 0
    for i in range(len(perturbations)):
        box = perturbations.box(i)
        pairs += sum(box is None or _overlap(place, box) for place in places.values())
    return pairs + len(objective.windows)


class _Change:
    """What both kinds share: windows outside, perturbations inside, so that a window is cut once."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        self.objective, self.perturbations = objective, perturbations
        self.result = torch.zeros((objective.n_targets, len(perturbations)), dtype=torch.float64)

    def pairs(self, indices: Sequence[int]) -> Iterator[tuple[_Pair, Tensor]]:
        """(pair, perturbed window) for all pairs that change a voxel."""
        plan, device = self.objective.plan, self.objective.model.device
        boxes = {i: self.perturbations.box(i) for i in indices}
        for w in self.objective.windows:
            place = plan.place(w)
            crop: Tensor | None = None
            for i in indices:
                box = boxes[i]
                if box is not None and not _overlap(place, box):
                    continue
                key = self.perturbations.key(i, w, place)
                if key is not None and self.known(_Pair(i, w, key)):
                    continue
                if crop is None:
                    crop = self.objective.image[_rows(slice(None), place)].to(device)
                perturbed = self.perturbations.apply(i, crop, place)
                if not torch.equal(perturbed, crop):
                    yield _Pair(i, w, key), plan.pad(perturbed)

    def known(self, pair: _Pair) -> bool:
        """Whether the pair's result is at hand (and, if so, it has been booked)."""
        return False

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
        self.scores: dict[Hashable, Tensor] = {}
        self.waiting: dict[Hashable, list[int]] = {}

    def run(self) -> Tensor:
        self._base()
        self.over(range(len(self.perturbations)))
        return self.result

    def _base(self) -> None:
        missing = [(0, w) for w in self.objective.windows if w not in self.objective.base_scores]

        def score(batch: Batch) -> None:
            with torch.inference_mode():
                found = batch.scores(batch.forward(batch.image)).cpu()
            for j, w in enumerate(batch.windows):
                self.objective.base_scores[w] = found[:, j].clone()

        self.objective.each(missing, score)

    def known(self, pair: _Pair) -> bool:
        name = (pair.window, pair.key)
        if name in self.scores:
            self.result[:, pair.index] += self.scores[name]
            return True
        if name in self.waiting:
            self.waiting[name].append(pair.index)
            return True
        self.waiting[name] = []
        return False

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
            self.result[:, pair.index] += row
            if pair.key is not None:
                name = (pair.window, pair.key)
                self.scores[name] = row
                for index in self.waiting.pop(name, []):
                    self.result[:, index] += row

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
        size = sum(p.numel() for p in self.predictions) * 8
        self.block = max(1, min(len(perturbations), BLOCK_BYTES // max(size, 1)))

    def run(self) -> Tensor:
        for start in range(0, len(self.perturbations), self.block):
            indices = range(start, min(start + self.block, len(self.perturbations)))
            self.position = {i: j for j, i in enumerate(indices)}
            self.delta = [torch.zeros((len(indices), *p.shape), dtype=torch.float64) for p in self.predictions]
            self.over(indices)
            for k, (score, p, d) in enumerate(zip(self.objective.scores, self.predictions, self.delta)):
                for j, i in enumerate(indices):
                    if bool(d[j].any()):
                        self.result[k, i] = (score.value(p + d[j].to(p.device)) - self.values[k]).cpu()
        return self.result

    def compute(self, pairs: Sequence[_Pair], windows: Sequence[Tensor]) -> None:
        out = self.forward(pairs, windows)
        base = self._unperturbed(list(dict.fromkeys(p.window for p in pairs)))
        objective = self.objective
        for j, pair in enumerate(pairs):
            difference = out[j].double() - base[pair.window].to(out.device).double()
            weighted = difference * objective.grid.weight(pair.window).to(out.device).double()
            for score, rows, support, delta in zip(objective.scores, objective.rows, objective.support, self.delta):
                if pair.window in support:
                    place = delta[self.position[pair.index]]
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
