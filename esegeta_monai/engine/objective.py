"""``F(x) = s(P(x))``: what a method may ask of a case, whatever its windows, targets and devices.

A method sees volumes and window batches, never a network or an inferer. For linear scores whole-volume quantities are
scatter-added sums over windows; for non-linear ones the cotangent ``∂s/∂P`` comes from a forward pass first.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esegeta_monai.engine.batch import NO_PATH, Batch, Gradient
from esegeta_monai.engine.dry_run import Timed
from esegeta_monai.engine.network.hooks import capture
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.progress import Monitor
from esegeta_monai.engine.score import Case, Score
from esegeta_monai.engine.sweep import InputGradient, Request, View
from esegeta_monai.engine.window_loop import Windowed
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.plan import Slices, WindowPlan, last_axes, picked
from esegeta_monai.errors import MethodError
from esegeta_monai.utils.distributed import Ranks, Summed, tensors_of
from esegeta_monai.utils.tensors import digest, largest

if TYPE_CHECKING:
    from esegeta_monai.engine.perturbation.checkpoint import ScoreTable

__all__ = ["Batch", "Gradient", "InputGradient", "Objective", "Request", "View"]


class Objective(Windowed):
    """One case, its targets and the network behind windows.

    Args:
        model: the network, frozen (see `esegeta_monai.engine.network.state.frozen`).
        image: (C, *spatial), on the device where volumes live.
        plan: the windows.
        scores: the bound targets.
        prediction: (K, *out) the unperturbed prediction by the user's own inferer; None: blended here when needed.
        out_shape: spatial shape of the prediction, where ``prediction`` is not given.
        seed: for every random draw; the same for all methods.
        monitor: counts passes, shows progress, keeps the time limit.
        condition: MONAI's ``condition`` volume (C, *spatial), cut to windows beside the image.
        case: where the image's voxels lie and the case's data, for feature maps given as files or keys.
        ranks: the processes that compute this case together, each with the same arguments; None: this one alone.
    """

    def __init__(
        self,
        model: Model,
        image: Tensor,
        plan: WindowPlan,
        scores: Sequence[Score],
        prediction: Tensor | None = None,
        *,
        out_shape: Sequence[int] | None = None,
        seed: int = 0,
        monitor: Monitor | None = None,
        condition: Tensor | None = None,
        case: Case | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(model, image, plan, monitor=monitor, condition=condition, ranks=ranks)
        self.case, self.scores, self.prediction, self.seed = case or Case(), list(scores), prediction, seed
        known = plan.spatial_shape if out_shape is None else out_shape  # () for a classification network
        shape = tuple(known if prediction is None else prediction.shape[1:])
        self.out_shape = shape
        if plan.whole:
            out_roi = shape
        elif shape == plan.spatial_shape:
            out_roi = plan.roi
        else:  # the output is scaled: by how much, one window tells
            with torch.inference_mode():
                out_roi = tuple(self.run(plan.cut(image, 0)[None].to(model.device), [0]).shape[2:])
        self.grid = OutputGrid(plan, out_roi, image.dtype, image.device)
        self.read = sorted({c for s in self.scores for c in s.channels})
        self.rows = [picked([self.read.index(c) for c in s.channels]) for s in self.scores]
        """Where each score's channels lie among those read."""
        self.support = [self.grid.windows_of(s.box, s.mask) if not s.empty else [] for s in self.scores]
        self.windows = sorted({w for windows in self.support for w in windows})
        self.blend_deviation: list[float | None] = [None] * len(self.scores)
        self.table: ScoreTable | None = None
        """Where a perturbation run keeps its scores on disk."""
        self.base_scores: dict[int, list[float] | None] = {}
        self.base_outputs: dict[int, list[Tensor | None] | None] = {}
        """What perturbed windows are compared with: of linear scores their values (k,), else what each score reads of
        the output; None: that it would have been computed, where a method is only timed."""
        self._at_image: list[Tensor] | None = None
        self._values: Tensor | None = None
        self.own_prediction = False
        """Whether F at the image is the network's own, although a prediction is given: one of another precision."""
        self.default_layer: str | None = None
        self.every: Sequence[int] = range(len(plan))
        """The windows of requests that look everywhere."""
        self.settled = False
        """Whether the precision is decided, see `esegeta_monai.methods.precision`."""
        self.sample: int | None = None
        """How many perturbations a window are scored before the method stops, see `first_windows`; None: all."""

    # -- what a method reads ------------------------------------------------------------------------------------

    @property
    def linear(self) -> bool:
        """Whether all scores are linear in the prediction."""
        return all(s.linear for s in self.scores)

    @property
    def n_targets(self) -> int:
        """k."""
        return len(self.scores)

    def at(self, image: Tensor) -> Objective:
        """The same objective (same frozen scores) at another image, whose perturbation scores are stored apart."""
        other = self.apart()
        other.image, other.prediction = image, None
        if self.table is not None:
            other.table = self.table.beside(image=digest(image).hex())
        other.blend_deviation = [None] * len(self.scores)
        return other

    def apart(self) -> Objective:
        """The same objective, of which nothing has been computed yet."""
        other = copy.copy(self)
        other.base_scores, other.base_outputs, other._at_image, other._values = {}, {}, None, None
        return other

    def first_windows(self, sample: int) -> Objective:
        """The first window that each target sees, alone: as if the prediction were what this window gives.

        It is for a look at what a method computes, on this process alone: unblended, without time limit, progress,
        scores on disk or log. A method that perturbs the image scores at most ``sample`` perturbations that change such
        a window, and stops with `esegeta_monai.engine.perturbation.scoring.Sampled`.
        """
        other = self.apart()
        other.support = [windows[:1] for windows in self.support]
        other.windows = sorted({w for windows in other.support for w in windows})
        other.every, other.grid = other.windows, self.grid.unblended()
        other.blend_deviation = [0.0] * len(self.scores)
        other.monitor, other.ranks, other.table = Monitor(silent=True), Ranks(), None
        other.settled, other.sample = True, sample
        return other

    def with_scores(self, scores: Sequence[Score]) -> Objective:
        """The same case and network, asked for other scores."""
        other = Objective(
            self.model,
            self.image,
            self.plan,
            scores,
            self.prediction,
            out_shape=self.out_shape,
            seed=self.seed,
            monitor=self.monitor,
            condition=self.condition,
            case=self.case,
            ranks=self.ranks,
        )
        other.window_batch = self.window_batch
        return other

    @property
    def n_classes(self) -> int:
        """K, the number of channels of the prediction."""
        if self.prediction is not None:
            return len(self.prediction)
        probe = copy.copy(self)
        probe.read = []
        with torch.inference_mode():
            return probe.run(self.plan.cut(self.image, 0)[None].to(self.model.device), [0]).shape[1]

    def only(self, target: int) -> Objective:
        """The same objective with one of its targets, on which nothing has run yet."""
        other = self.apart()
        other.scores, other.support = [self.scores[target]], [self.support[target]]
        other.read = sorted(set(self.scores[target].channels))
        other.rows = [picked([other.read.index(c) for c in self.scores[target].channels])]
        other.windows = sorted(self.support[target])
        other.blend_deviation = [None]
        other.monitor = Monitor()
        return other

    def generator(self) -> torch.Generator:
        """A fresh generator with the run's seed: every method draws the same numbers on every device."""
        return torch.Generator().manual_seed(self.seed)

    def new_maps(self, channels: int | None = None) -> Tensor:
        """Zeros (k, C, *spatial)."""
        return self._zeros(self.n_targets, channels or self.image.shape[0], *self.plan.spatial_shape)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.image.dtype, device=self.image.device)

    # -- values -------------------------------------------------------------------------------------------------

    def image_values(self) -> Tensor:
        """F at the image (k,), float64."""
        if self._values is None:
            self._values = torch.stack([s.value(p) for s, p in zip(self.scores, self.image_predictions())])
        return self._values

    @property
    def asked(self) -> bool:
        """Whether something has asked for `image_values`."""
        return self._values is not None

    def constants(self) -> Tensor:
        """What linear scores give beside the sum over windows: s at a prediction of zeros (k,), float64; else 0."""
        return torch.tensor([s.constant() if s.linear else 0.0 for s in self.scores], dtype=torch.float64)

    def value(self, points: Tensor) -> Tensor:
        """F at volumes (m, C, *spatial): (k, m), float64; forward passes over the windows that the targets see."""
        predictions = self.predict(points)
        return torch.stack([s.value(p) for s, p in zip(self.scores, predictions)])

    def predict(self, points: Tensor) -> list[Tensor]:
        """The blended prediction at volumes (m, C, *spatial): for each score what it reads, (m, channels, *box)."""
        blended = self.new_predictions(len(points))

        def run(batch: Batch) -> None:
            with torch.inference_mode():
                out = batch.forward(batch.cut(points))
            self.blend(blended, batch, out)

        self.each(self._jobs(len(points)), run, with_cotangents=False, sums=blended)
        return blended

    def blend(self, blended: Sequence[Tensor], batch: Batch, out: Tensor) -> None:
        """Adds ``ĝ_w · out`` into each score's (m, channels, *box) in place."""
        for j, (w, source) in enumerate(zip(batch.windows, batch.sources)):
            for score, rows, windows, total in zip(self.scores, self.rows, self.support, blended):
                if w in windows:
                    self.grid.blend(total[source], score.box, w, out[j, rows])

    def new_predictions(self, m: int) -> list[Tensor]:
        """Zeros for what each score reads of m predictions, (m, channels, *box): what `blend` adds into."""
        return [self._new_prediction(s, m) for s in self.scores]

    def _new_prediction(self, score: Score, m: int) -> Tensor:
        return self._zeros(m, len(score.channels), *(b.stop - b.start for b in score.box))

    def image_predictions(self) -> list[Tensor]:
        """For each score what it reads of the prediction at the image, (channels, *box)."""
        if self.prediction is not None and not self.own_prediction:
            return [s.crop(self.prediction) for s in self.scores]
        if self._at_image is None:
            self._at_image = [p[0] for p in self.predict(self.image[None])]
        return self._at_image

    # -- gradients ----------------------------------------------------------------------------------------------

    def gradient(self, points: Tensor, turn: int | None = None) -> Gradient:
        """Gradients and values at volumes (m, C, *spatial).

        Args:
            turn: for linear scores only: gives this process's part of the windows alone, see `each`.
        """
        m = len(points)
        predictions = None if self.linear else self.predict(points)
        maps = self._zeros(self.n_targets, m, *self.image.shape)
        padding = maps.new_zeros(maps.shape[:3])
        values = self.constants()[:, None].repeat(1, m)

        def run(batch: Batch) -> None:
            gradient, out = batch.gradient(batch.cut(points))
            scores = batch.scores(out).cpu()
            for j, source in enumerate(batch.sources):
                values[:, source] += scores[:, j]
                padding[:, source] += self.plan.add(maps[:, source], batch.windows[j], gradient[:, j]).to(padding)

        self.each(self._jobs(m), run, predictions=predictions, sums=[maps, padding, values], turn=turn)
        if predictions is not None:
            values = torch.stack([s.value(p) for s, p in zip(self.scores, predictions)])
        return Gradient(maps, values, padding)

    def scatter(
        self,
        attribute: Callable[[Batch], Tensor],
        sums: Sequence[Tensor | Summed] = (),
    ) -> tuple[Tensor, Tensor]:
        """Sums per-window attributions into volume maps: exact for additive methods and linear scores.

        Args:
            attribute: gets a batch, returns (k, n, C, *roi).
            sums: what else ``attribute`` adds into, see `each`.

        Returns:
            maps (k, C, *spatial) and what fell on constant padding (k, C).
        """
        maps = self.new_maps()
        padding = maps.new_zeros(maps.shape[:2])

        def run(batch: Batch) -> None:
            padding.add_(self.add(maps, batch, attribute(batch)))

        kind = _kind(attribute)
        self.each(self._jobs(1), run, sums=[maps, padding, *sums], kind=kind)
        return maps, padding

    def add(self, maps: Tensor, batch: Batch, values: Tensor) -> Tensor:
        """Scatter-adds (k, n, C, *roi) into (k, C, *spatial) in place; returns the padding's share (k, C)."""
        lost = maps.new_zeros(maps.shape[:2])
        for j, w in enumerate(batch.windows):
            lost += self.plan.add(maps, w, values[:, j]).to(lost.device, lost.dtype)
        return lost

    def sweep(self, requests: Sequence[Request]) -> list[Any]:
        """One pass over the windows that serves all requests: shared forwards, one backward a target.

        Returns each request's result; requests of equal key are gathered once.
        """
        unique = {r.key: r for r in requests}
        todo = list(unique.values())
        layers = sorted({name for r in todo for name in r.layers})
        for r in todo:
            r.begin(self)
        backward, supported = any(r.backward for r in todo), set(self.windows)
        blended = None
        if self.prediction is not None and any(d is None for d in self.blend_deviation):
            blended = self.new_predictions(1)

        def run(batch: Batch) -> None:
            seen = not supported.isdisjoint(batch.windows)
            wanting = [r for r in todo if seen or r.everywhere]
            view = self._view(batch, layers, wanting, seen)
            if blended is not None and seen:
                self.blend(blended, batch, view.out)
            for r in wanting:
                r.see(view)

        everywhere = any(r.everywhere for r in todo)
        jobs = [(0, w) for w in self.every] if everywhere else self._jobs(1)
        sums = _sums(todo, blended or [])
        kind = tuple(type(r).__name__ for r in todo)
        least = int(sums is not None and any(t is None for t in tensors_of(sums)))  # or there would be no result
        self.each(jobs, run, with_cotangents=backward, split_seen=everywhere, sums=sums, kind=kind, least=least)
        if blended is not None:
            self._note_deviation(blended)
        return [unique[r.key].result() for r in requests]

    def _view(self, batch: Batch, layers: Sequence[str], wanting: Sequence[Request], seen: bool) -> View:
        backward = seen and any(r.backward for r in wanting)
        x = batch.image
        wants_input = backward and any(r.input_gradient for r in wanting)
        if wants_input:
            x = x.detach().requires_grad_(True)
        with torch.set_grad_enabled(backward), capture(self.model.network, layers, leaves=True) as captured:
            out = batch.forward(x)
        for name in layers:
            if name not in captured:
                raise MethodError(f"layer {name!r} is not used in the forward pass: choose another")
            if self.model.inferer is not None and captured.calls[name] > 1:  # its windows are not known
                raise MethodError(
                    f"layer {name!r} runs {captured.calls[name]} times under {type(self.model.inferer).__name__}, "
                    "whose windows are not known: use SlidingWindowInferer, or an input method"
                )
        gradients: dict[str, Tensor] = {}
        at_input = None
        if backward:
            with_grad = [n for r in wanting if r.backward for n in r.layers]
            names = [n for n in dict.fromkeys(with_grad) if captured[n].requires_grad]
            found = []
            if names or wants_input:
                found = batch.gradients(out, [captured[n] for n in names] + ([x] if wants_input else []))
            gradients = {n: g for n, g in zip(names, found) if g is not None}
            at_input = found[-1] if wants_input else None
            if wants_input and at_input is None:
                raise MethodError(NO_PATH)
        activations = {n: captured[n].detach() for n in layers}
        return View(batch, out.detach(), activations, gradients, at_input, seen)

    def _note_deviation(self, blended: Sequence[Tensor]) -> None:
        assert self.prediction is not None
        for k, (score, mine) in enumerate(zip(self.scores, blended)):
            if score.empty:
                continue
            theirs = score.crop(self.prediction)
            off = mine[0].sub_(theirs).mul_(score.mask.to(mine.device))  # in place: these are whole volumes
            self.blend_deviation[k] = largest(off) / max(largest(theirs), torch.finfo(mine.dtype).tiny)

    # -- windows ------------------------------------------------------------------------------------------------

    def _jobs(self, m: int) -> list[tuple[int, int]]:
        return [(p, w) for p in range(m) for w in self.windows]

    def each(
        self,
        jobs: Sequence[tuple[int, int]],
        run: Callable[[Batch], None],
        *,
        predictions: list[Tensor] | None = None,
        cotangents: list[Tensor] | None = None,
        with_cotangents: bool = True,
        split_seen: bool = False,
        sums: Sequence[Tensor | Summed] | None = None,
        whole_windows: bool = False,
        kind: Hashable = None,
        least: int = 0,
        turn: int | None = None,
    ) -> None:
        """Runs (volume, window) jobs in batches; a batch that does not fit in memory is halved and done again.

        Args:
            jobs: what to run, those of one window best together.
            run: called with each batch.
            predictions: of each volume, what the scores read, where cotangents depend on it.
            cotangents: for each score (channels, *box), in place of ``∂s/∂P``.
            with_cotangents: False: the batches have none.
            split_seen: windows that some target sees first, so that they come in batches of their own.
            sums: all that ``run`` adds into, and only adds into: then several processes share the jobs, and the sums
                are those of all of them. None: each process runs all jobs.
            whole_windows: all jobs of a window are one process's.
            kind, least: where the method is only timed, loops of one kind take as long a job (None: those of one
                ``run``), and so many jobs are run in any case, see `esegeta_monai.engine.dry_run`.
            turn: the number of this call among several whose sums the caller adds up and brings together itself, in
                one `Ranks.summed` round all of them: shares go round, and ``sums`` stay this process's part.
        """
        groups = [list(jobs)]
        if split_seen:
            support = set(self.windows)
            groups = [[j for j in jobs if j[1] in support], [j for j in jobs if j[1] not in support]]
        whole: list[Tensor | None] | None = None if cotangents is None else list(cotangents)
        if with_cotangents and predictions is None and whole is None:
            whole = self._whole_cotangents()

        def one(windows: list[int], sources: list[int], first: bool) -> None:
            found: list[Tensor | None] = [None] * self.n_targets
            if with_cotangents:
                found = self._batch_cotangents(windows, sources, whole, predictions)
            run(Batch(self, windows, sources, found, first=first))

        timed = Timed(_kind(run) if kind is None else kind, least, sums is not None, whole_windows)
        self.loop(groups, one, timed, sums, turn)

    def cotangents(self, windows: Sequence[int]) -> list[Tensor | None]:
        """``ĝ_w ∂s/∂P`` at the image, for each target (n, R, *out_roi), None where it sees none of the windows."""
        return self._batch_cotangents(windows, [0] * len(windows), self._whole_cotangents(), None)

    def weighted_cotangent(self, k: int, window: int, volume: Tensor | None = None) -> tuple[Slices, Tensor]:
        """Where a window's output meets the box of score k, and ``ĝ_w ∂s/∂P`` there: (channels or 1, *part).

        Args:
            volume: ``∂s/∂P`` (channels, *box); None: of a linear score.
        """
        score = self.scores[k]
        inside, in_box = self.grid.meet(score.box, window)

        def cut(values: Tensor) -> Tensor:
            return values[last_axes(in_box)]

        part = score.window_cotangent(cut) if volume is None else cut(volume)
        weight = self.grid.weight(window, inside)
        return inside, part.to(weight.device) * weight

    def _whole_cotangents(self) -> list[Tensor | None]:
        """``∂s/∂P`` at the image of each score that is not linear; a linear one is cut from its mask."""
        if self.linear:
            return [None] * self.n_targets
        return [None if s.linear else s.cotangent(p) for s, p in zip(self.scores, self.image_predictions())]

    def _batch_cotangents(
        self,
        windows: Sequence[int],
        sources: Sequence[int],
        whole: list[Tensor | None] | None,
        predictions: list[Tensor] | None,
    ) -> list[Tensor | None]:
        """``ĝ_w ∂s/∂P`` for each target: (n, R, *out_roi), None where the target sees none of the windows."""
        found: list[Tensor | None] = []
        for k, (score, support) in enumerate(zip(self.scores, self.support)):
            if not set(windows) & set(support):
                found.append(None)
                continue
            at: dict[int, Tensor | None] = {}
            if predictions is not None and not score.linear:
                at = {source: score.cotangent(predictions[k][source]) for source in set(sources)}
            elif whole is not None:
                at = dict.fromkeys(sources, whole[k])
            shape = (len(windows), len(self.read), *self.grid.out_roi)
            total = torch.zeros(shape, dtype=self.image.dtype, device=self.model.device)
            for j, (w, source) in enumerate(zip(windows, sources)):
                if w in support:
                    inside, part = self.weighted_cotangent(k, w, at.get(source))
                    index: tuple[Any, ...] = (j, self.rows[k], *inside)
                    total[index] = part.to(total)
            found.append(total)
        return found


def _kind(function: Callable[..., Any]) -> Hashable:
    """What functions made at one place in the code share."""
    found: Hashable = getattr(function, "__code__", None)
    return found if found is not None else id(type(function))


def _sums(requests: Sequence[Request], blended: Sequence[Tensor]) -> list[Tensor | Summed] | None:
    """What a sweep adds into, None where a request does not say."""
    parts = [r.parts for r in requests]
    return None if any(p is None for p in parts) else [*blended, *(one for p in parts if p is not None for one in p)]
