"""``F(x') − F(x)`` for many perturbations of one volume, recomputing only the windows that each one touches.

    linear s:      F(x') − F(x) = Σ_touched (F_w(x'_w) − F_w(x_w))
    non-linear s:  ΔP = Σ_touched ĝ_w (f(x'_w) − f(x_w)) on the mask of s,   F(x') − F(x) = s(P + ΔP) − s(P)

`esegeta_monai.engine.perturbation.batching` runs the perturbed windows. A linear s reads the box of its mask in a
window's output. A non-linear s reads the mask's voxels (`esegeta_monai.engine.perturbation.mask_voxels`); if it is a
sum over voxels, only those inside the touched windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.local.passes import PartsDiffer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.batching import (
    BatchedScorer,
    PerturbedWindow,
    all_fit,
    by_window,
    chunks,
    count_passes,
    cut,
    output_bytes,
    runs,
)
from esegeta_monai.engine.perturbation.mask_voxels import MaskVoxels, WindowVoxels
from esegeta_monai.engine.run_context import SampleComplete
from esegeta_monai.engine.windows.plan import Slices
from esegeta_monai.utils.tensors import take, true_positions

__all__ = ["known_passes", "known_score_changes", "passes_needed", "score_changes"]

PICKED = 2
"""Cost of gathering a voxel relative to reading it in order."""

LOOKED_AT = 8
"""Perturbations that are tried for each one that is sampled: it has to change the window."""


def score_changes(objective: Objective, perturbations: Perturbations) -> Tensor:
    """Score perturbed images: ``F(x') − F(x)`` for every target and perturbation.

    Only windows that a perturbation changes and that a target sees are computed again. Batches have
    ``objective.window_batch`` perturbed windows, and are halved when memory runs out.

    Args:
        objective: the case, its network and its k targets.
        perturbations: m perturbations of ``objective.image``.

    Returns:
        (k, m), float64, on the CPU, in the units of the target, of either sign; NaN where the network returns NaN.

    Raises:
        SampleComplete: the context asks for a sample only; its scores are in `RunContext.sample`.
        MethodTimeout: a limit of the run was reached.
        MethodError: one window does not fit into memory.
    """
    sample = objective.context.sample
    if sample is not None:
        drawn = _sample(objective, perturbations, sample.perturbations)
        sample.scores = _scores(objective, perturbations.take(drawn))
        raise SampleComplete(f"{len(drawn)} perturbations were scored")
    return _scores(objective, perturbations)


def _scores(objective: Objective, perturbations: Perturbations) -> Tensor:
    objective.context.local_note = None
    kind = _LinearScorer if objective.linear else _BlendedScorer
    scorer: BatchedScorer = kind(objective, perturbations, True)
    try:
        scores = scorer.run()
        if scorer.local is not None:
            scorer.local.finish()
        return scores
    except PartsDiffer as error:
        objective.context.progress.warn(
            f"perturbed windows computed in parts differ from plain passes, which are used instead: {error}"
        )
        objective.context.local_note = {"reason": f"a check failed: {error}"}
        return kind(objective, perturbations, False).run()
    finally:
        if scorer.local is not None:
            objective.context.local_note = {**scorer.local.note(), **(objective.context.local_note or {})}


def _sample(objective: Objective, perturbations: Perturbations, n: int) -> list[int]:
    """Draw at most n perturbations for each window from those that change it."""
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
    """Score perturbed images as `score_changes` does, but reuse scores that this objective has: (k, m), float64.

    Perturbations of equal `Perturbations.identity` are equal. Those without an identity are always scored.
    """
    table = _known(objective)
    names, first = _unknown(objective, perturbations)
    scores = score_changes(objective, perturbations.take(first))
    columns = {i: j for j, i in enumerate(first)}
    for i, j in columns.items():
        if (name := names[i]) is not None:
            table[name] = scores[:, j].clone()
    rows = [scores[:, columns[i]] if name is None else table[name] for i, name in enumerate(names)]
    return torch.stack(rows, 1) if rows else scores


def known_passes(objective: Objective, *rounds: Perturbations) -> int:
    """Count the window passes of `known_score_changes` for sets of perturbations, in order; no network runs."""
    return passes_needed(objective, *(p.take(_unknown(objective, p)[1]) for p in rounds))


def _unknown(objective: Objective, perturbations: Perturbations) -> tuple[list[Hashable | None], list[int]]:
    """Return the identities of perturbations, and the first perturbation of each identity without a score."""
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
    """Count the window passes of `score_changes` for sets of perturbations, in order, on an objective on which nothing
    has been computed.

    The perturbed windows are compared with the image; no network runs.
    """
    unperturbed = (
        0
        if objective.linear or (objective.prediction is not None and not objective.recompute_value)
        else len(objective.windows)
    )
    known: set[int] = set()
    return unperturbed + sum(count_passes(objective, p, known) for p in rounds)


class _LinearScorer(BatchedScorer):
    """Linear scores: differences of window scores, summed in float64; unperturbed scores are computed once."""

    def __init__(self, objective: Objective, perturbations: Perturbations, local: bool) -> None:
        super().__init__(objective, perturbations, local)
        self.unperturbed = objective.memo("window scores", dict)
        self.weights: dict[int, list[tuple[Slices, Tensor] | None]] = {}
        self.turn = 0

    def own(self, groups: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Return the perturbed windows of this process; they are distributed in turn."""
        size, first = self.processes.size, self.turn + 1
        self.turn += len(groups)
        return [g for turn, g in enumerate(groups, first) if turn % size == self.processes.rank]

    def run(self) -> Tensor:
        self.restored = self.done
        if self.processes.size > 1:  # each process may need any of them
            self._score_unperturbed()
        with self.processes.summed([self.result]):
            self.compute(by_window(self.objective, self.perturbations))
        return self.result

    def _score_unperturbed(self) -> None:
        """Score all unperturbed windows; the processes share them."""
        missing = [w for w in self.objective.windows if w not in self.unperturbed]
        scores = torch.zeros((len(missing), self.objective.n_targets), dtype=torch.float64)
        rows = {w: row for row, w in enumerate(missing)}

        def score(batch: Batch) -> None:
            with torch.inference_mode():
                values = self.scores(batch.windows, batch.forward(batch.image))
            scores[[rows[w] for w in batch.windows]] = torch.tensor(values, dtype=torch.float64)

        self.objective.each([(0, w) for w in missing], score, with_cotangents=False, sums=[scores])
        self.unperturbed.update(zip(missing, scores.tolist()))

    def add(self, windows: Sequence[PerturbedWindow], out: Tensor) -> None:
        result = self.result.numpy()  # shares the memory: adding to a few places is slow in torch
        for (perturbed, w), scores in zip(windows, self.scores([p.window for p in windows], out)):
            if not perturbed:
                self.unperturbed[w] = scores
                continue
            indices = perturbed[0] if len(perturbed) == 1 else list(perturbed)
            for k, (after, before) in enumerate(zip(scores, self.unperturbed[w])):
                result[k, indices] += after - before
            self.done += 1

    def measure(self, window: int, out: Tensor) -> Sequence[Sequence[float]]:
        """Return the window's scores."""
        return [[score] for score in self.scores([window], out)[0]]

    def scores(self, windows: Sequence[int], out: Tensor) -> list[list[float]]:
        """Return ``F_w`` from network output (n, R, *out_roi): k numbers for each of the n windows."""
        parts: list[list[Tensor]] = [[] for _ in self.objective.rows]
        for w, rows in runs(windows):
            for weighted, channels, values in zip(self._weights_of(w), self.objective.rows, parts):
                if weighted is None:
                    values.append(out.new_zeros(rows.stop - rows.start, dtype=torch.float64))
                else:
                    inside, weight = weighted
                    where: tuple[Any, ...] = (rows, channels, *inside)
                    values.append(out[where].double().flatten(1) @ weight.to(out.device))
        scores = torch.cat([part for values in parts for part in values]).tolist()
        return [scores[j :: len(out)] for j in range(len(out))]

    def _weights_of(self, window: int) -> list[tuple[Slices, Tensor] | None]:
        """Return for each score the box of its mask in a window's output, and ``ĝ_w ∂s/∂P`` there as a float64 vector;
        None if the score does not see the window."""
        if window not in self.weights:  # windows come in order: only the last one can come again
            self.weights.clear()
            self.weights[window] = [
                self._weight(k, window) if window in windows else None
                for k, windows in enumerate(self.objective.score_windows)
            ]
        return self.weights[window]

    def _weight(self, k: int, window: int) -> tuple[Slices, Tensor]:
        inside, weight = self.objective.weighted_cotangent(k, window)
        channels = len(self.objective.scores[k].channels)
        return inside, weight.double().expand(channels, *weight.shape[1:]).flatten()


class _BlendedScorer(BatchedScorer):
    """Non-linear scores: the changes of window outputs at the masks' voxels are kept until a perturbation is complete;
    then ΔP is blended and scored."""

    def __init__(self, objective: Objective, perturbations: Perturbations, local: bool) -> None:
        super().__init__(objective, perturbations, local)
        self.mask_voxels = [MaskVoxels(objective, k) for k in range(objective.n_targets)]
        self.sizes = output_bytes(objective, self.mask_voxels)
        self.keep_outputs = all_fit(self.sizes)
        self._window_voxels: dict[int, list[WindowVoxels | None]] = {}
        self.before = [s.of(p) for s, p in zip(self.mask_voxels, objective.image_predictions())]
        with torch.inference_mode():  # computed as for changed voxels, so that unchanged ones cancel exactly
            self.terms = [s.score.terms(p) if s.score.additive else None for s, p in zip(self.mask_voxels, self.before)]
        self.delta = [torch.zeros_like(p, dtype=objective.image.dtype) for p in self.before]
        self.after = [torch.empty_like(p) for p in self.before]
        self.unperturbed = objective.memo("window outputs", dict) if self.keep_outputs else {}
        self.parts: dict[int, list[list[tuple[WindowVoxels, Tensor]]]] = {}
        """For each perturbation and score, the changes of its windows."""

    def run(self) -> Tensor:
        with self.processes.summed([self.result]):
            own = self.processes.share(range(len(self.perturbations)))[self.done :]
            for indices, chunk in chunks(self.objective, self.perturbations, own, self.sizes):
                self.unperturbed = self.unperturbed if self.keep_outputs else {}
                self.parts = {i: [[] for _ in self.mask_voxels] for i in indices}
                for w, _ in chunk:  # before the forward passes, which evict the CPU caches
                    self.window_voxels(w)
                self.compute(chunk)
                for i in indices:
                    self._score(i)
                self.done += len(indices)
                self.save()
        return self.result

    def window_voxels(self, window: int) -> list[WindowVoxels | None]:
        """Return for each score its voxels inside a window; None if it does not see the window."""
        if window not in self._window_voxels:
            if not self.keep_outputs:  # windows come in order: only the last one can come again
                self._window_voxels.clear()
            self._window_voxels[window] = [
                s.window_voxels(window) if window in s.windows else None for s in self.mask_voxels
            ]
        return self._window_voxels[window]

    def add(self, windows: Sequence[PerturbedWindow], out: Tensor) -> None:
        by_window = runs([p.window for p in windows])
        changes: list[tuple[tuple[int, ...], int, WindowVoxels, Tensor]] = []
        unperturbed: dict[int, list[Any]] = {
            w: [None] * len(self.mask_voxels) for w, rows in by_window if not windows[rows.start].indices
        }
        for k, mask_voxels in enumerate(self.mask_voxels):
            seen = [(w, rows, v) for w, rows in by_window if (v := self.window_voxels(w)[k]) is not None]
            for (w, rows, voxels), values in zip(seen, mask_voxels.read(out, [(rows, v) for _, rows, v in seen])):
                after, perturbed = values.to(self.objective.image.device), windows[rows]
                if w in unperturbed:  # the unperturbed window is the first
                    unperturbed[w][k], after, perturbed = after[0].clone(), after[1:], perturbed[1:]
                if perturbed:
                    before: Tensor = (unperturbed if w in unperturbed else self.unperturbed)[w][k]
                    changed = torch.sub(after, before).mul_(voxels.weight)
                    changes += [(p.indices, k, voxels, change) for p, change in zip(perturbed, changed)]
        if unperturbed and not self.keep_outputs:
            self.unperturbed.clear()
        self.unperturbed.update(unperturbed)
        for indices, k, voxels, change in changes:
            for i in indices:
                self.parts[i][k].append((voxels, change))

    def measure(self, window: int, out: Tensor) -> Sequence[Sequence[float]]:
        """Return for each score what it would be if the window's output were the prediction there; of a score that is
        no sum over voxels, the sums of what it reads."""
        numbers: list[list[float]] = []
        for mask_voxels, voxels in zip(self.mask_voxels, self.window_voxels(window)):
            if voxels is None:
                numbers.append([])
            else:
                (values,) = mask_voxels.read(out, [(slice(0, 1), voxels)])
                score = mask_voxels.score
                terms = score.terms(values[0].double()) if score.additive else values[0].double()
                numbers.append(terms.sum(-1).reshape(-1).tolist())
        return numbers

    @torch.inference_mode()
    def _score(self, index: int) -> None:
        """Compute ``s(P + ΔP) − s(P)`` of one perturbation from the changes of its windows."""
        result = self.result.numpy()
        for k, touched in enumerate(self.parts.pop(index)):
            if touched:
                for voxels, change in touched:
                    self.delta[k].index_add_(1, voxels.voxels, change)
                result[k, index] = self._difference(k, [voxels for voxels, _ in touched])

    def _difference(self, k: int, touched: Sequence[WindowVoxels]) -> float:
        """Return the difference of score k for ``delta`` = ΔP, and set ``delta`` to zero."""
        mask_voxels, before, delta, terms = self.mask_voxels[k], self.before[k], self.delta[k], self.terms[k]
        score = mask_voxels.score
        if terms is None:
            after = mask_voxels.box(before + delta)
            delta.zero_()
            return float(score.value(after) - score.value(mask_voxels.box(before)))
        if PICKED * sum(len(voxels.voxels) for voxels in touched) > mask_voxels.n:
            after = score.terms(self.after[k].copy_(delta).add_(before))
            delta.zero_()
            return float(after.sub_(terms).sum())
        if len(touched) == 1:
            at = touched[0].voxels
        else:
            here = torch.zeros(mask_voxels.n, dtype=torch.bool, device=delta.device)
            for voxels in touched:
                here.index_fill_(0, voxels.voxels, True)
            at = true_positions(here)
        after = score.terms(take(before, at) + take(delta, at))
        delta.index_fill_(1, at, 0)
        return float(after.sub_(take(terms, at)).sum())
