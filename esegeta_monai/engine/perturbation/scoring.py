"""``F(x') − F(x)`` for many perturbations of one volume, recomputing only the windows that each one touches.

    linear s:      F(x') − F(x) = Σ_touched (F_w(x'_w) − F_w(x_w))
    non-linear s:  ΔP = Σ_touched ĝ_w (f(x'_w) − f(x_w)) on the mask of s,   F(x') − F(x) = s(P + ΔP) − s(P)

What goes through the network is `esegeta_monai.engine.perturbation.batching`. Of a window's output a linear s looks at
the box of its mask,
another one at the mask's voxels (`esegeta_monai.engine.perturbation.mask_voxels`), and where that one is a sum over
voxels only at those that
the touched windows hold.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.batching import (
    Pair,
    Pairs,
    blocks,
    by_window,
    cut,
    fit,
    pair_passes,
    runs,
    sizes_of,
)
from esegeta_monai.engine.perturbation.mask_voxels import Held, Support
from esegeta_monai.engine.run_context import SampleComplete
from esegeta_monai.engine.windows.plan import Slices
from esegeta_monai.utils.tensors import take, true_positions

__all__ = ["known_passes", "known_score_changes", "passes_needed", "score_changes"]

PICKED = 2
"""By how much to pick voxels of the mask one by one is dearer than to look at all of them."""

WEIGHTS_BYTES = 2**22
"""Memory for the weights of windows that come next (linear s): to make several at once takes half the time."""

LOOKED_AT = 8
"""Perturbations of a window that are looked at for one that changes it, before fewer are sampled."""


def score_changes(objective: Objective, perturbations: Perturbations) -> Tensor:
    """Score perturbed images: ``F(x') − F(x)`` for every target and perturbation.

    Only the windows that a perturbation changes, and that a target sees, are computed again. Batches hold
    ``objective.window_batch`` pairs of perturbation and window; where memory runs out they are halved.

    Args:
        objective: the case, its network and its k targets.
        perturbations: m perturbations of ``objective.image``.

    Returns:
        (k, m), float64, on the CPU, in the units of the target; any finite sign, and NaN where the network gives NaN.

    Raises:
        SampleComplete: the context asks for a sample only (`RunContext.sample`), which holds the scores.
    """
    sample = objective.context.sample
    if sample is not None:
        drawn = _sample(objective, perturbations, sample.perturbations)
        sample.scores = _scores(objective, perturbations.take(drawn))
        raise SampleComplete(f"{len(drawn)} perturbations were scored")
    return _scores(objective, perturbations)


def _scores(objective: Objective, perturbations: Perturbations) -> Tensor:
    if objective.linear:
        return _LinearChange(objective, perturbations).run()
    return _BlendedChange(objective, perturbations).run()


def _sample(objective: Objective, perturbations: Perturbations, n: int) -> list[int]:
    """At most n perturbations for each window, drawn from those that change a voxel of it."""
    chosen: set[int] = set()
    generator = objective.generator()
    for w in objective.windows:
        place, crop = cut(objective, w)
        near = perturbations.reaching(place)
        order = torch.randperm(len(near), generator=generator).tolist()[: LOOKED_AT * n]
        changing = (near[j] for j in order if perturbations.changes(near[j], crop, place))
        chosen.update(itertools.islice(changing, n))
    return sorted(chosen)


def known_score_changes(objective: Objective, perturbations: Perturbations) -> Tensor:
    """Score perturbed images as `score_changes` does; scores that this objective has are reused: (k, m), float64.

    Perturbations are equal where their `Perturbations.identity` is; without one they are always scored.
    """
    table = _known(objective)
    names, first = _unknown(objective, perturbations)
    found = score_changes(objective, perturbations.take(first))
    columns = {i: j for j, i in enumerate(first)}
    for i, j in columns.items():
        if (name := names[i]) is not None:
            table[name] = found[:, j].clone()
    rows = [found[:, columns[i]] if name is None else table[name] for i, name in enumerate(names)]
    return torch.stack(rows, 1) if rows else found


def known_passes(objective: Objective, *rounds: Perturbations) -> int:
    """Window passes that `known_score_changes` needs for one set of perturbations after the other; no network runs."""
    return passes_needed(objective, *(p.take(_unknown(objective, p)[1]) for p in rounds))


def _unknown(objective: Objective, perturbations: Perturbations) -> tuple[list[Hashable | None], list[int]]:
    """The identities of perturbations, and the first of each that has not been scored yet."""
    table = _known(objective)
    names = [perturbations.identity(i) for i in range(len(perturbations))]
    first: dict[Hashable, int] = {}
    for i, name in enumerate(names):
        if name is None or name not in table:
            first.setdefault(i if name is None else (name,), i)
    return names, list(first.values())


def _known(objective: Objective) -> dict[Hashable, Tensor]:
    """Return the scores by `Perturbations.identity`, shared by the methods that run on one objective: (k,) each."""
    scores: dict[Hashable, Tensor] = objective.memo("perturbation scores", dict)
    return scores


def passes_needed(objective: Objective, *rounds: Perturbations) -> int:
    """Window passes that `score_changes` needs for one set of perturbations after the other, on an objective of which
    nothing has been computed yet; perturbed windows are looked at for that, but no network runs."""
    unperturbed = (
        0
        if objective.linear or (objective.prediction is not None and not objective.recompute_value)
        else len(objective.windows)
    )
    known: set[int] = set()
    return unperturbed + sum(pair_passes(objective, p, known) for p in rounds)


class _LinearChange(Pairs):
    """Scores of windows add up: cached unperturbed scores, and sums in float64."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        super().__init__(objective, perturbations)
        self.base = objective.memo("window scores", dict)
        self.weights: dict[int, list[tuple[Slices, Tensor] | None]] = {}
        self.turn = 0

    def mine(self) -> bool:
        """Pairs go round the processes."""
        self.turn += 1
        return self.turn % self.processes.size == self.processes.rank

    def run(self) -> Tensor:
        self.known = self.done
        if self.processes.size > 1:  # shared: each process may need each of them
            self._base()
        with self.processes.summed([self.result]):
            self.over(by_window(self.objective, self.perturbations))
        return self.result

    def _base(self) -> None:
        """Scores of all windows as they are."""
        missing = [w for w in self.objective.windows if w not in self.base]
        found = torch.zeros((len(missing), self.objective.n_targets), dtype=torch.float64)
        rows = {w: row for row, w in enumerate(missing)}

        def score(batch: Batch) -> None:
            with torch.inference_mode():
                scores = self.scores(batch.windows, batch.forward(batch.image))
            found[[rows[w] for w in batch.windows]] = torch.tensor(scores, dtype=torch.float64)

        self.objective.each([(0, w) for w in missing], score, with_cotangents=False, sums=[found])
        self.base.update(zip(missing, found.tolist()))

    def book(self, pairs: Sequence[Pair], out: Tensor) -> None:
        result = self.result.numpy()  # its own memory: to add to few places is dear in torch
        for pair, scores in zip(pairs, self.scores([p.window for p in pairs], out)):
            if not pair.indices:
                self.base[pair.window] = scores
                continue
            indices = pair.indices[0] if len(pair.indices) == 1 else list(pair.indices)
            for k, (after, before) in enumerate(zip(scores, self.base[pair.window])):
                result[k, indices] += after - before
            self.done += 1

    def scores(self, windows: Sequence[int], out: Tensor) -> list[list[float]]:
        """``F_w`` from network output (n, R, *out_roi): k for each of the windows."""
        found: list[list[Tensor]] = [[] for _ in range(self.objective.n_targets)]
        for w, rows in runs(windows):
            for weighted, channels, parts in zip(self._weights_of(w), self.objective.rows, found):
                if weighted is None:
                    parts.append(out.new_zeros(rows.stop - rows.start, dtype=torch.float64))
                else:
                    inside, weight = weighted
                    where: tuple[Any, ...] = (rows, channels, *inside)
                    parts.append(out[where].double().flatten(1) @ weight.to(out.device))
        values = torch.cat([part for parts in found for part in parts]).tolist()
        return [values[j :: len(out)] for j in range(len(out))]

    def _weights_of(self, window: int) -> list[tuple[Slices, Tensor] | None]:
        """For each score the box of its mask in a window's output, and ``ĝ_w ∂s/∂P`` there as a vector in float64; None
        where it sees none of the window."""
        if window not in self.weights:  # windows come in order: made for this one and, at once, for some of the next
            self.weights.clear()
            held = 0
            for w in self.objective.windows[bisect_left(self.objective.windows, window) :]:
                self.weights[w] = [
                    self._weight(k, w) if w in support else None
                    for k, support in enumerate(self.objective.score_windows)
                ]
                held += sum(one[1].nbytes for one in self.weights[w] if one is not None)
                if held >= WEIGHTS_BYTES:
                    break
        return self.weights[window]

    def _weight(self, k: int, window: int) -> tuple[Slices, Tensor]:
        inside, weight = self.objective.weighted_cotangent(k, window)
        channels = len(self.objective.scores[k].channels)
        return inside, weight.double().expand(channels, *weight.shape[1:]).flatten()


class _BlendedChange(Pairs):
    """Non-linear scores: what each window changes at the masks' voxels is kept until all windows of a perturbation are
    known; then ΔP is blended and scored."""

    def __init__(self, objective: Objective, perturbations: Perturbations) -> None:
        super().__init__(objective, perturbations)
        self.supports = [Support(objective, k) for k in range(objective.n_targets)]
        self.sizes = sizes_of(objective, self.supports)
        self.keeps = fit(self.sizes)
        self._held: dict[int, list[Held | None]] = {}
        self.before = [s.of(p) for s, p in zip(self.supports, objective.image_predictions())]
        with torch.inference_mode():  # as changed voxels are scored: what does not change cancels
            self.terms = [s.score.terms(p) if s.score.additive else None for s, p in zip(self.supports, self.before)]
        self.delta = [torch.zeros_like(p, dtype=objective.image.dtype) for p in self.before]
        self.after = [torch.empty_like(p) for p in self.before]
        self.base = objective.memo("window outputs", dict) if self.keeps else {}
        self.parts: dict[int, list[list[tuple[Held, Tensor]]]] = {}
        """For each perturbation and score what its windows change."""

    def run(self) -> Tensor:
        with self.processes.summed([self.result]):
            mine = self.processes.share(range(len(self.perturbations)))[self.done :]
            for indices, block in blocks(self.objective, self.perturbations, mine, self.sizes):
                self.base = self.base if self.keeps else {}
                self.parts = {i: [[] for _ in self.supports] for i in indices}
                for w, _ in block:  # before the passes, which empty the processor's caches
                    self.held(w)
                self.over(block)
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

    def book(self, pairs: Sequence[Pair], out: Tensor) -> None:
        windows = list(runs([p.window for p in pairs]))
        booked: list[tuple[Pair, int, Held, Tensor]] = []
        base: dict[int, list[Any]] = {
            w: [None] * len(self.supports) for w, rows in windows if not pairs[rows.start].indices
        }
        for k, support in enumerate(self.supports):
            held = [(w, rows, h) for w, rows in windows if (h := self.held(w)[k]) is not None]
            for (w, rows, h), one in zip(held, support.read(out, [(rows, h) for _, rows, h in held])):
                seen, some = one.to(self.objective.image.device), pairs[rows]
                if w in base:  # the window as it is comes first
                    base[w][k], seen, some = seen[0].clone(), seen[1:], some[1:]
                if some:
                    before: Tensor = (base if w in base else self.base)[w][k]
                    changed = torch.sub(seen, before).mul_(h.weight)
                    booked += [(pair, k, h, change) for pair, change in zip(some, changed)]
        if base and not self.keeps:
            self.base.clear()
        self.base.update(base)
        for pair, k, h, changed in booked:
            for i in pair.indices:
                self.parts[i][k].append((h, changed))

    @torch.inference_mode()
    def _score(self, index: int) -> None:
        """``s(P + ΔP) − s(P)`` of one perturbation, from what its windows changed."""
        result = self.result.numpy()
        for k, touched in enumerate(self.parts.pop(index)):
            if touched:
                for held, part in touched:
                    self.delta[k].index_add_(1, held.voxels, part)
                result[k, index] = self._difference(k, [held for held, _ in touched])

    def _difference(self, k: int, touched: Sequence[Held]) -> float:
        """Of score k, from ``delta``, which is zero afterwards."""
        support, before, delta, terms = self.supports[k], self.before[k], self.delta[k], self.terms[k]
        score = support.score
        if terms is None:
            after = support.box(before + delta)
            delta.zero_()
            return float(score.value(after) - score.value(support.box(before)))
        if PICKED * sum(len(held.voxels) for held in touched) > support.n:
            after = score.terms(self.after[k].copy_(delta).add_(before))
            delta.zero_()
            return float(after.sub_(terms).sum())
        if len(touched) == 1:
            at = touched[0].voxels
        else:
            here = torch.zeros(support.n, dtype=torch.bool, device=delta.device)
            for held in touched:
                here.index_fill_(0, held.voxels, True)
            at = true_positions(here)
        after = score.terms(take(before, at) + take(delta, at))
        delta.index_fill_(1, at, 0)
        return float(after.sub_(take(terms, at)).sum())
