"""Perturbed windows: list them, count their passes, run them through the network in full batches.

Perturbed windows of different places share batches. A window that a perturbation leaves unchanged is never computed.
Perturbations that are equal inside a window share one perturbed window.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esegeta_monai.engine.local.passes import LocalPasses
from esegeta_monai.engine.network.model import out_of_memory
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import UNCHANGED, Perturbations
from esegeta_monai.engine.perturbation.mask_voxels import MaskVoxels
from esegeta_monai.engine.windows.plan import Slices, last_axes
from esegeta_monai.errors import MethodTimeout

__all__ = [
    "BatchedScorer",
    "Chunk",
    "PerturbedWindow",
    "all_fit",
    "by_window",
    "chunks",
    "count_passes",
    "cut",
    "output_bytes",
    "runs",
]

CHUNK_BYTES = 256 * 2**20
"""Memory in bytes for the changed outputs of a chunk (non-linear s), and the same again for unperturbed outputs, which
the objective keeps if all of them fit."""

CHUNK = 512
"""Largest number of perturbations in a chunk (non-linear s). After each chunk its scores are complete and are
saved."""


STAGED, STAGED_BYTES = 16, 8 * 2**20
"""Prepare and add up to STAGED batches at a time (at most STAGED_BYTES): each forward pass evicts the CPU caches, so
alternating is slow."""


class PerturbedWindow(NamedTuple):
    """One window and the perturbations that are equal in it; no perturbation: the unperturbed window."""

    indices: tuple[int, ...]
    window: int


Chunk = Iterable[tuple[int, list[tuple[int, ...]]]]
"""Perturbed windows, window by window: (window, groups of perturbations that are equal in it)."""


def cut(objective: Objective, window: int) -> tuple[Slices, Tensor]:
    """Return a window's place in the volume, and the image there (C, *place) on the network's device."""
    place = objective.plan.place(window)
    return place, objective.image[last_axes(place)].to(objective.model.device)


def by_window(objective: Objective, perturbations: Perturbations) -> Iterator[tuple[int, list[tuple[int, ...]]]]:
    """Yield the perturbed windows of all perturbations as one chunk.

    Keys are computed for several windows ahead, until `CHUNK` perturbations have been counted, see `STAGED`.
    """
    gathered: list[tuple[int, list[tuple[int, ...]]]] = []
    count = 0
    for w in objective.windows:
        place = objective.plan.place(w)
        groups: dict[Hashable, list[int]] = {}
        for i, key in _keys(perturbations, perturbations.reaching(place), w, place):
            groups.setdefault(key, []).append(i)
        if groups:
            gathered.append((w, [tuple(g) for g in groups.values()]))
            count += sum(map(len, groups.values()))
        if count >= CHUNK:
            yield from gathered
            gathered, count = [], 0
    yield from gathered


def _keys(
    perturbations: Perturbations, indices: Sequence[int], window: int, place: Slices
) -> Iterator[tuple[int, Hashable]]:
    """Yield the perturbations that may change a window, each with its key; one without a key gets a unique one."""
    for i, key in zip(indices, perturbations.keys(indices, window, place)):
        if key != UNCHANGED:
            yield i, ("alone", i) if key is None else ("key", key)


def chunks(
    objective: Objective, perturbations: Perturbations, indices: Sequence[int], sizes: Mapping[int, int]
) -> Iterator[tuple[list[int], Chunk]]:
    """Split perturbations into chunks, limited by `CHUNK` and by `CHUNK_BYTES` of changed outputs.

    Args:
        objective: the case.
        perturbations: all perturbations.
        indices: those to split, in order.
        sizes: see `output_bytes`.

    Yields:
        The perturbations of a chunk, and their perturbed windows.
    """
    members: list[int] = []
    groups: dict[int, dict[Hashable, list[int]]] = {w: {} for w in objective.windows}
    total = 0

    def chunk() -> tuple[list[int], Chunk]:
        return members, [(w, [tuple(g) for g in by_key.values()]) for w, by_key in groups.items() if by_key]

    for i, keys in _keyed(objective, perturbations, indices):
        new = sum(sizes[w] for w, key in keys.items() if key not in groups[w])
        if members and (len(members) == CHUNK or total + new > CHUNK_BYTES):
            yield chunk()
            members, groups, total = [], {w: {} for w in objective.windows}, 0
            new = sum(sizes[w] for w in keys)
        members.append(i)
        total += new
        for w, key in keys.items():
            groups[w].setdefault(key, []).append(i)
    if members:
        yield chunk()


def _keyed(
    objective: Objective, perturbations: Perturbations, indices: Sequence[int]
) -> Iterator[tuple[int, dict[int, Hashable]]]:
    """Yield each perturbation with its keys in the windows that it may change; computed for `CHUNK` perturbations at
    once."""
    places = {w: objective.plan.place(w) for w in objective.windows}
    reaching = {w: perturbations.reaching(place) for w, place in places.items()}
    near = {w: reached if isinstance(reached, range) else set(reached) for w, reached in reaching.items()}
    for start in range(0, len(indices), CHUNK):
        part: dict[int, dict[int, Hashable]] = {i: {} for i in indices[start : start + CHUNK]}
        for w, place in places.items():
            for i, key in _keys(perturbations, [i for i in part if i in near[w]], w, place):
                part[i][w] = key
        yield from part.items()


def output_bytes(objective: Objective, mask_voxels: Sequence[MaskVoxels]) -> dict[int, int]:
    """Return the bytes of each window's output at the voxels of all masks, by window."""
    item = objective.image.element_size()
    return {
        w: sum(s.count(w) * len(s.score.channels) * item for s in mask_voxels if w in s.windows)
        for w in objective.windows
    }


def all_fit(sizes: Mapping[int, int]) -> bool:
    """Return True if the unperturbed outputs of all windows fit in `CHUNK_BYTES`."""
    return sum(sizes.values()) <= CHUNK_BYTES


def count_passes(objective: Objective, perturbations: Perturbations, known: set[int]) -> int:
    """Count the window passes of all perturbed windows and of the unperturbed windows they are compared with.

    No network runs.

    Args:
        objective: the case.
        perturbations: the perturbations.
        known: unperturbed windows that have been computed; updated.
    """

    def touched(chunk: Chunk) -> list[int]:
        """Return the window of each perturbed window that differs from the image."""
        windows: list[int] = []
        for w, groups in chunk:
            place, crop = cut(objective, w)
            windows += [w for group in groups if perturbations.changes(group[0], crop, place)]
        return windows

    if objective.linear:
        changed = touched(by_window(objective, perturbations))
        compared = set(changed if objective.context.processes.size == 1 else objective.windows) - known
        known |= compared
        return len(changed) + len(compared)
    sizes = output_bytes(objective, [MaskVoxels(objective, k) for k in range(objective.n_targets)])
    parts = [touched(b) for _, b in chunks(objective, perturbations, range(len(perturbations)), sizes)]
    unperturbed = [set(part) for part in parts]
    if all_fit(sizes):
        unperturbed = [set().union(*unperturbed) - known]
        known |= unperturbed[0]
    return sum(map(len, parts)) + sum(map(len, unperturbed))


def runs(windows: Sequence[int]) -> list[tuple[int, slice]]:
    """List each window of a batch with its rows; rows of one window are adjacent."""
    rows, start = [], 0
    for w, same in itertools.groupby(windows):
        stop = start + len(list(same))
        rows.append((w, slice(start, stop)))
        start = stop
    return rows


class BatchedScorer:
    """Scores of perturbations, computed in full batches of perturbed windows.

    Subclasses implement `add`, which receives the network's output.

    Perturbed windows are written directly into the network's input, so that no more than one batch is in memory
    (several for small windows, see `STAGED`), and each is copied once.

    Args:
        objective: the case, its network and its k targets.
        perturbations: m perturbations of its image.
        local: compute windows in parts where that saves work; False: by plain passes, from the start, whatever a
            checkpoint holds.

    Attributes:
        result: scores so far (k, m), float64.
        done: perturbed windows (linear s) or perturbations (non-linear s) that ``result`` includes.
        position: number of the next perturbed window, in the order that is the same in every run.
        restored: perturbed windows that a checkpoint covers; they are skipped.
    """

    def __init__(self, objective: Objective, perturbations: Perturbations, local: bool) -> None:
        self.objective, self.perturbations, self.processes = objective, perturbations, objective.context.processes
        self.result = torch.zeros((objective.n_targets, len(perturbations)), dtype=torch.float64)
        self.done = self.position = self.restored = 0
        self.unperturbed: dict[int, Any] = {}
        """Scores or outputs of the unperturbed windows, by window."""
        self.local = LocalPasses(objective, self.measure) if local else None
        self._rows: Tensor | None = None
        self._pending: list[PerturbedWindow] = []
        checkpoint = objective.checkpoint if objective.context.processes.size == 1 else None
        self.name = None if checkpoint is None else perturbations.fingerprint()
        self.checkpoint = None if self.name is None else checkpoint
        if local and self.checkpoint is not None and self.name is not None:
            stored = self.checkpoint.read(self.name, tuple(self.result.shape))
            if stored is not None:
                self.result, self.done = stored

    def run(self) -> Tensor:
        """Return the scores of all perturbations (k, m), float64."""
        raise NotImplementedError

    def save(self, *, force: bool = False) -> None:
        """Write the scores so far to the checkpoint, if there is one."""
        if self.checkpoint is not None and self.name is not None:
            self.checkpoint.write(self.name, self.result, self.done, force=force)

    def own(self, groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the perturbed windows that this process computes: all of them."""
        return groups

    def measure(self, window: int, out: Tensor) -> Sequence[Sequence[float]]:
        """Return for each target the numbers that make up its score, from a window's output (1, R, *out_roi)."""
        raise NotImplementedError

    def add(self, windows: Sequence[PerturbedWindow], out: Tensor) -> None:
        """Add the output of a batch (n, R, *out_roi) to the result: all of it, or nothing if memory runs out."""
        raise NotImplementedError

    def compute(self, chunk: Chunk) -> None:
        """Run all perturbed windows of a chunk in full batches; each window's unperturbed version comes first, unless
        it is known."""
        self._pending = []
        for w, groups in chunk:
            place, crop = cut(self.objective, w)
            if self._rows is None:
                self._rows = self._new_rows(crop)
            todo = [PerturbedWindow(g, w) for g in self.own(groups)]
            if self.local is not None:
                self.local.expect(w, len(todo))
            at = 0
            while at < len(todo) and (self.position < self.restored or w not in self.unperturbed):
                # skip those of an earlier run: the order is the same in every run
                changes = self.perturbations.changes(todo[at].indices[0], crop, place)
                if self.position >= self.restored and changes:
                    self._enqueue([PerturbedWindow((), w)], crop, place)
                    break
                self.position += changes
                at += 1
            while at < len(todo):
                at += self._enqueue(todo[at : at + self._free_rows], crop, place)
        while self._pending:
            self._flush()

    @property
    def _free_rows(self) -> int:
        """Rows of the batches that are not in use."""
        assert self._rows is not None
        return len(self._rows) - len(self._pending)

    def _enqueue(self, windows: Sequence[PerturbedWindow], crop: Tensor, place: Slices) -> int:
        """Write perturbed windows of one place into free rows; run the batches once they are full.

        Returns:
            The number of perturbed windows.
        """
        self._write(windows, crop, place)
        while self._pending and self._free_rows <= 0:
            self._flush()
        return len(windows)

    def _write(self, windows: Sequence[PerturbedWindow], crop: Tensor, place: Slices) -> None:
        """Append the perturbed windows that differ from the image to the pending ones."""
        plan, n = self.objective.plan, len(self._pending)
        padded = plan.padded
        assert self._rows is not None
        rows = self._rows[n : n + len(windows)]
        out = crop.new_empty((len(windows), *crop.shape)) if padded else rows
        if windows[0].indices:
            written = self.perturbations.write([p.indices[0] for p in windows], crop, place, out)
            self.position += len(written)
            windows = [windows[j] for j in written]
        else:
            out.copy_(crop)
        if padded:
            rows[: len(windows)] = plan.pad(out[: len(windows)])
        self._pending += windows

    def _new_rows(self, crop: Tensor) -> Tensor:
        """Allocate rows for one batch (n, C, *roi), or for several small ones."""
        objective = self.objective
        roi = objective.plan.roi
        size = (len(crop) * math.prod(roi) + len(objective.channels) * objective.grid.size) * crop.element_size()
        batches = max(1, min(STAGED, STAGED_BYTES // (size * objective.window_batch)))
        while True:
            try:
                return crop.new_empty((batches * objective.window_batch, len(crop), *roi))
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if batches == 1:
                    objective.shrink(objective.window_batch, error)
                batches = 1

    def _flush(self) -> None:
        """Run the pending batches and add their outputs; those that did not fit into memory stay pending."""
        assert self._rows is not None
        waiting, n, timed_out = self._pending, self.objective.window_batch, False
        passed: list[tuple[list[PerturbedWindow], Tensor]] = []
        try:
            with torch.inference_mode():
                for start in range(0, len(waiting), n):
                    self.objective.context.progress.check()
                    batch = waiting[start : start + n]
                    x = self._rows[start : start + len(batch)]
                    passed.append((batch, self._run(x, batch)))
        except MethodTimeout:
            timed_out = True
            raise
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.objective.shrink(len(batch), error)
        finally:  # completed passes are added, whatever stopped the others
            rest = waiting[self._add_all(passed) :]
            self.save(force=timed_out)
        self._pending, position = [], self.position
        for window in rest:  # left over after memory ran out; the failed pass may have overwritten their rows
            place, crop = cut(self.objective, window.window)
            self._write([window], crop, place)
        self.position = position

    def _run(self, x: Tensor, batch: Sequence[PerturbedWindow]) -> Tensor:
        """Run a batch (n, C, *roi), in parts where that saves work: (n, R, *out_roi)."""
        if self.local is None:
            return self.objective.run(x, [p.window for p in batch])
        return self.local.run(x, batch)

    def _add_all(self, passed: Sequence[tuple[list[PerturbedWindow], Tensor]]) -> int:
        """Add the outputs of batches, one after the other, until memory runs out.

        Returns:
            The number of perturbed windows that were added.
        """
        count = 0
        for batch, out in passed:
            try:
                self.add(batch, out)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                self.objective.shrink(len(batch), error)
                break
            count += len(batch)
        return count
