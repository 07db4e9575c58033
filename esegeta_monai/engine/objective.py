"""``F(x) = s(P(x))``: all that methods compute on a case, the same for all window plans, targets and devices.

For linear scores, whole-volume quantities are sums over windows. For other scores, the cotangent ``∂s/∂P`` comes from a
forward pass over all windows first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from esegeta_monai.engine.batch import Batch, Gradient
from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.engine.score import Case, Score
from esegeta_monai.engine.window_loop import Jobs, WindowedNetwork
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.plan import Slices, WindowPlan, last_axes, picked
from esegeta_monai.errors import InputError
from esegeta_monai.utils.distributed import Summed
from esegeta_monai.utils.tensors import digest

__all__ = ["Objective"]

T = TypeVar("T")

_SHARED = ("channels", "rows", "score_windows", "windows")
"""Cached properties that depend on scores and plan only."""


@dataclass(frozen=True, eq=False)
class Objective(WindowedNetwork):
    """One case, its targets and its network. Nothing is assigned to it after construction.

    Attributes:
        model: the network, frozen (see `esegeta_monai.engine.network.state.frozen`).
        image: (C, *spatial), on the device where volumes are stored.
        plan: the windows.
        scores: the bound targets.
        prediction: (K, *out), the unperturbed prediction by the user's own inferer; None: blended here when needed.
        condition: MONAI's ``condition`` volume (C, *spatial), cut to windows like the image; None: there is none.
        context: progress, processes, checkpoint and batch size of the run.
        out_shape: spatial shape of the prediction, where ``prediction`` is not given; None: that of the image.
        seed: for every random draw; the same for all methods.
        case: affine and data dictionary of the case, for feature maps given as files or keys.
        recompute_value: True: recompute F(image); the given prediction was made in another precision.
        first_windows: how many windows of each target count, unblended, see `derive`; None: all.
        differs_by: what differs from the objective of the run: ``"image"`` and ``"precision"`` are part of the key
            under which perturbation scores are stored; where the ``"problem"`` differs, none are stored.
        grid: the grid of the prediction with the blending weights; None: it is made from the fields above. Where the
            prediction has another shape than the image, that takes one window pass.
    """

    scores: Sequence[Score] = ()
    prediction: Tensor | None = None
    _: KW_ONLY
    out_shape: Sequence[int] | None = None
    seed: int = 0
    case: Case = field(default_factory=Case)
    recompute_value: bool = False
    first_windows: int | None = None
    differs_by: frozenset[str] = frozenset()
    grid: OutputGrid = None  # type: ignore[assignment] # made in __post_init__
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.grid is not None:
            return
        known = self.plan.spatial_shape if self.out_shape is None else self.out_shape  # () for a classification network
        shape = tuple(known if self.prediction is None else self.prediction.shape[1:])
        if self.plan.whole:
            out_roi = shape
        elif shape == self.plan.spatial_shape:
            out_roi = self.plan.roi
        else:  # the output is scaled: one window shows by how much
            with evaluating(self.model.network, self.model.device), torch.inference_mode():
                out_roi = tuple(self.run(self.window(0), [0]).shape[2:])
            self._check_shape(shape, out_roi)
        object.__setattr__(self, "grid", OutputGrid(self.plan, out_roi, self.image.dtype, self.image.device))

    def _check_shape(self, shape: tuple[int, ...], out_roi: tuple[int, ...]) -> None:
        """Check that the prediction has the shape (*out) that windows of shape (*out_roi) blend to."""
        known, roi = self.plan.spatial_shape, self.plan.roi
        if len(shape) == len(out_roi) == len(roi):
            blended = [n * o / r for n, o, r in zip(known, out_roi, roi)]
            if all(abs(n - b) <= 1 for n, b in zip(shape, blended)):
                return
        raise InputError(
            f"the prediction has the shape {shape}, but the network gives {out_roi} for windows of {roi} of an image "
            f"of {known}: give the network's own raw output, before it is resampled or cropped"
        )

    def check_output(self, out: Tensor) -> None:
        """Check an output of the network (n, K, *out_roi) against the prediction.

        Raises:
            InputError: the prediction has other channels, or another shape where one window is the whole image.
        """
        given = self.prediction
        if given is None or out.ndim < 2 or "problem" in self.differs_by:  # such as the output of a layer
            return
        if out.shape[1] != len(given) or (self.plan.whole and tuple(out.shape[2:]) != tuple(given.shape[1:])):
            raise InputError(
                f"the prediction has the shape {tuple(given.shape)}, but the network gives {tuple(out.shape[1:])} for "
                "an image: give its own raw output, before postprocessing"
            )

    # -- variants and computed values ---------------------------------------------------------------------------

    def derive(self, *, first_windows: int | None = None, full_precision: bool = False, **changes: Any) -> Objective:
        """Return a variant of this objective, without computed values.

        Args:
            first_windows: number of windows that each target keeps, as if the prediction were the output of these
                windows alone. Give a context made by `RunContext.for_sample` with it.
            full_precision: run the network without autocast.
            changes: fields of the dataclass and their new values. ``image``: F at another image; its prediction is not
                known unless given, and its perturbation scores are stored under a key of their own.

        >>> import torch
        >>> from esegeta_monai.engine.network.model import Model
        >>> from esegeta_monai.engine.windows.inferers import plan_windows
        >>> model = Model(torch.nn.Identity(), torch.device("cpu"))
        >>> objective = Objective(model, torch.zeros(1, 4, 4), plan_windows(None, (4, 4)))
        >>> objective.derive(image=torch.ones(1, 4, 4)).image.mean()
        tensor(1.)
        """
        differs = set(self.differs_by)
        if "image" in changes:
            changes.setdefault("prediction", None)
            differs.add("image")
        if full_precision:
            changes |= {"model": self.model.without_autocast(), "grid": self.grid}
            changes.setdefault("recompute_value", not self.first_windows)
            differs.add("precision")
        if first_windows is not None:
            changes |= {"first_windows": first_windows, "grid": self.grid.unblended()}
        if {"plan", "model", "out_shape"} & set(changes) and "grid" not in changes:
            changes |= {"grid": None, "out_shape": changes.get("out_shape", self.grid.shape)}
        if {"plan", "model", "scores"} & set(changes) - ({"model"} if full_precision else set()):
            differs.add("problem")
        other = dataclasses.replace(self, differs_by=frozenset(differs), **changes)
        if "problem" not in differs and self.knows("default layer"):  # of network and target, not of the image
            other._memo["default layer"] = self._memo["default layer"]
        if not {"plan", "model", "scores", "first_windows", "grid"} & set(changes):  # the same windows hold the masks
            vars(other).update({name: vars(self)[name] for name in _SHARED if name in vars(self)})
        if full_precision:  # windows are compared with one prediction, whatever the precision
            other._memo["blend deviations"] = self.blend_deviations()
        return other

    def of_calls(self, plan: WindowPlan, scores: Sequence[Score]) -> Objective:
        """Return F of some members or views alone: the same masks, baselines, draws and default layer.

        Args:
            plan: a part of the windows of this plan.
            scores: the scores.
        """
        other = self.derive(plan=plan, scores=scores, prediction=None)
        if self.knows("default layer"):
            other._memo["default layer"] = self._memo["default layer"]
        return other

    def in_float64(self) -> Objective:
        """Return this objective with a copy of the network in float64; F at the image is recomputed.

        Raises:
            Exception: whatever copying the network or converting it to float64 raises.
        """
        condition = None if self.condition is None else self.condition.double()
        prediction = None if self.prediction is None else self.prediction.double()
        model, image = self.model.in_float64(), self.image.double()
        other = self.derive(model=model, image=image, condition=condition, prediction=prediction, recompute_value=True)
        if self.knows("default layer"):  # rounding must not choose another one
            other._memo["default layer"] = self._memo["default layer"]
        other._memo["blend deviations"] = self.blend_deviations()
        return other

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` computes, computed once per objective; it never passes on to a derived objective."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def knows(self, key: Hashable) -> bool:
        """Return True if `memo` has computed this key."""
        return key in self._memo

    @property
    def checkpoint(self) -> ScoreCheckpoint | None:
        """Where perturbation scores of this objective are stored; None: nowhere."""
        checkpoint = self.context.checkpoint
        if checkpoint is None or not self.differs_by:
            return checkpoint
        if "problem" in self.differs_by:
            return None
        key = {"precision": "full"} if "precision" in self.differs_by else {}
        if "image" in self.differs_by:
            key["image"] = digest(self.image).hex()
        return checkpoint.with_key(**key)

    # -- targets ------------------------------------------------------------------------------------------------

    @cached_property
    def channels(self) -> list[int]:
        """Output channels that some score reads, sorted: R of them."""
        return sorted({c for s in self.scores for c in s.channels})

    @cached_property
    def rows(self) -> list[list[int] | slice]:
        """For each score, the positions of its channels in `channels`."""
        return [picked([self.channels.index(c) for c in s.channels]) for s in self.scores]

    @cached_property
    def score_windows(self) -> list[list[int]]:
        """For each score, the windows that hold a voxel of its mask."""
        windows = [self.grid.windows_of(s.box, s.mask) if not s.empty else [] for s in self.scores]
        return [w[: self.first_windows] for w in windows]

    @cached_property
    def windows(self) -> list[int]:
        """Windows that hold a voxel of some score's mask, sorted."""
        return sorted({w for windows in self.score_windows for w in windows})

    @property
    def all_windows(self) -> Sequence[int]:
        """All windows of the plan; for a trial run those of the targets only."""
        return self.windows if self.first_windows else range(len(self.plan))

    @property
    def linear(self) -> bool:
        """True if all scores are linear in the prediction."""
        return all(s.linear for s in self.scores)

    @property
    def n_targets(self) -> int:
        """Number of scores, k."""
        return len(self.scores)

    @property
    def n_classes(self) -> int:
        """Number of channels of the prediction, K; one window pass where no prediction is given."""
        if self.prediction is not None:
            return len(self.prediction)
        with torch.inference_mode():
            return self.run(self.window(0), [0], all_channels=True).shape[1]

    def generator(self) -> torch.Generator:
        """Return a new generator with the run's seed: every method draws the same numbers on every device."""
        return torch.Generator().manual_seed(self.seed)

    def new_maps(self, channels: int | None = None) -> Tensor:
        """Return zeros (k, C, *spatial); ``channels`` replaces C."""
        return self.image.new_zeros((self.n_targets, channels or self.image.shape[0], *self.plan.spatial_shape))

    # -- values -------------------------------------------------------------------------------------------------

    def image_values(self) -> Tensor:
        """Return F at the image (k,), float64."""
        return self.memo(
            "value", lambda: torch.stack([s.value(p) for s, p in zip(self.scores, self.image_predictions())])
        )

    def constants(self) -> Tensor:
        """Return what linear scores add to the sum over windows: s at a prediction of zeros (k,), float64; else 0."""
        return torch.tensor([s.constant() if s.linear else 0.0 for s in self.scores], dtype=torch.float64)

    def value(self, points: Tensor) -> Tensor:
        """Return F at volumes (m, C, *spatial): (k, m), float64, in units of the targets.

        Runs the network on the windows that targets see.
        """
        predictions = self.predict(points)
        return torch.stack([s.value(p) for s, p in zip(self.scores, predictions)])

    def predict(self, points: Tensor) -> list[Tensor]:
        """Return the blended prediction at volumes (m, C, *spatial): what each score reads, (m, channels, *box)."""
        blended = self.new_predictions(len(points))

        def run(batch: Batch) -> None:
            with torch.inference_mode():
                out = batch.forward(batch.cut(points))
            self.blend(blended, batch, out)

        self.each(self.jobs(len(points)), run, with_cotangents=False, sums=blended)
        return blended

    def predict_all(self) -> Tensor:
        """Return all channels of the blended prediction at the image, (K, *out), whatever the scores read."""
        total = self.image.new_zeros((self.n_classes, *self.grid.shape))
        box = tuple(slice(0, n) for n in self.grid.shape)

        def run(batch: Batch) -> None:
            with torch.inference_mode():
                out = self.run(batch.image, batch.windows, all_channels=True)
            for j, window in enumerate(batch.windows):
                self.grid.blend(total, box, window, out[j])

        self.each([(0, w) for w in range(len(self.plan))], run, with_cotangents=False, sums=[total])
        return total

    def blend(self, blended: Sequence[Tensor], batch: Batch, out: Tensor) -> None:
        """Add ``ĝ_w · out`` (n, R, *out_roi) into each score's (m, channels, *box) in place."""
        for j, (w, source) in enumerate(zip(batch.windows, batch.sources)):
            for score, rows, windows, total in zip(self.scores, self.rows, self.score_windows, blended):
                if w in windows:
                    self.grid.blend(total[source], score.box, w, out[j, rows])

    def new_predictions(self, m: int) -> list[Tensor]:
        """Return zeros for what each score reads of m predictions, (m, channels, *box): what `blend` adds into."""
        return [self.image.new_zeros((m, len(s.channels), *(b.stop - b.start for b in s.box))) for s in self.scores]

    def image_predictions(self) -> list[Tensor]:
        """Return what each score reads of the prediction at the image, (channels, *box)."""
        if self.prediction is not None and not self.recompute_value:
            return [s.crop(self.prediction) for s in self.scores]
        return self.memo("prediction", lambda: [p[0] for p in self.predict(self.image[None])])

    def blend_deviations(self) -> list[float | None]:
        """Return how far the blended windows deviate from the given prediction, per score, relative to its largest
        value; None where no sweep has compared them."""
        return self.memo("blend deviations", lambda: [None] * self.n_targets)

    # -- gradients ----------------------------------------------------------------------------------------------

    def gradient(self, points: Tensor, turn: int | None = None) -> Gradient:
        """Return gradients and values at volumes (m, C, *spatial).

        Args:
            points: the volumes.
            turn: for linear scores only: return the part of this process alone, see `each`.

        Raises:
            MethodError: there is no differentiable path from the input to the output.
        """
        m = len(points)
        predictions = None if self.linear else self.predict(points)
        maps = self.image.new_zeros((self.n_targets, m, *self.image.shape))
        padding = maps.new_zeros(maps.shape[:3])
        values = self.constants()[:, None].repeat(1, m)

        def run(batch: Batch) -> None:
            gradient, out = batch.gradient(batch.cut(points))
            scores = batch.scores(out).cpu()
            for j, source in enumerate(batch.sources):
                values[:, source] += scores[:, j]
                padding[:, source] += self.plan.add(maps[:, source], batch.windows[j], gradient[:, j]).to(padding)

        self.each(self.jobs(m), run, predictions=predictions, sums=[maps, padding, values], turn=turn)
        if predictions is not None:
            values = torch.stack([s.value(p) for s, p in zip(self.scores, predictions)])
        return Gradient(maps, values, padding)

    def scatter(
        self,
        attribute: Callable[[Batch], Tensor],
        sums: Sequence[Tensor | Summed] = (),
    ) -> tuple[Tensor, Tensor]:
        """Sum attributions of windows into volume maps: exact for additive methods and linear scores.

        Args:
            attribute: called with a batch, returns (k, n, C, *roi).
            sums: further tensors that ``attribute`` adds into, see `each`.

        Returns:
            Maps (k, C, *spatial), and the part that fell on constant padding (k, C).
        """
        maps = self.new_maps()
        padding = maps.new_zeros(maps.shape[:2])

        def run(batch: Batch) -> None:
            padding.add_(self.add(maps, batch, attribute(batch)))

        self.each(self.jobs(1), run, sums=[maps, padding, *sums])
        return maps, padding

    def add(self, maps: Tensor, batch: Batch, values: Tensor) -> Tensor:
        """Add (k, n, C, *roi) into (k, C, *spatial) in place; return the part that fell on padding (k, C)."""
        lost = maps.new_zeros(maps.shape[:2])
        for j, w in enumerate(batch.windows):
            lost += self.plan.add(maps, w, values[:, j]).to(lost.device, lost.dtype)
        return lost

    # -- windows ------------------------------------------------------------------------------------------------

    def jobs(self, m: int) -> Jobs:
        """Return all pairs of m volumes and the windows that targets see."""
        return [(p, w) for p in range(m) for w in self.windows]

    def each(
        self,
        jobs: Jobs,
        run: Callable[[Batch], None],
        *,
        predictions: list[Tensor] | None = None,
        cotangents: list[Tensor] | None = None,
        with_cotangents: bool = True,
        split_seen: bool = False,
        sums: Sequence[Tensor | Summed] | None = None,
        whole_windows: bool = False,
        turn: int | None = None,
    ) -> None:
        """Run (volume, window) jobs in batches; halve a batch that does not fit into memory and run it again.

        Args:
            jobs: pairs (volume, window), those of one window best side by side.
            run: called with each batch.
            predictions: what the scores read of each volume's prediction, where cotangents depend on it.
            cotangents: for each score (channels, *box), in place of ``∂s/∂P``.
            with_cotangents: False: the batches have none.
            split_seen: put windows that some target sees first, in batches of their own.
            sums: everything that ``run`` adds into, and only adds into: then several processes share the jobs, and the
                sums are those of all processes. None: each process runs all jobs.
            whole_windows: give all jobs of a window to the same process.
            turn: number of this call among several whose sums the caller brings together itself, inside one
                `Processes.summed`: the shares rotate, and ``sums`` stay the part of this process.
        """
        groups: list[Jobs] = [list(jobs)]
        if split_seen:
            seen = set(self.windows)
            groups = [[j for j in jobs if j[1] in seen], [j for j in jobs if j[1] not in seen]]
        whole: list[Tensor | None] | None = None if cotangents is None else list(cotangents)
        if with_cotangents and predictions is None and whole is None and not self.linear:
            whole = self._whole_cotangents()

        def run_batch(windows: list[int], sources: list[int], first: bool) -> None:
            parts: list[Tensor | None] = [None] * self.n_targets
            if with_cotangents:
                parts = self._batch_cotangents(windows, sources, whole, predictions)
            run(Batch(self, windows, sources, parts, first=first))

        self.loop(groups, run_batch, sums=sums, whole_windows=whole_windows, turn=turn)

    def cotangents(self, windows: Sequence[int]) -> list[Tensor | None]:
        """Return ``ĝ_w ∂s/∂P`` at the image per target (n, R, *out_roi), None where it sees none of the windows."""
        whole = None if self.linear else self._whole_cotangents()  # linear scores need no prediction
        return self._batch_cotangents(windows, [0] * len(windows), whole, None)

    def weighted_cotangent(self, k: int, window: int, volume: Tensor | None = None) -> tuple[Slices, Tensor]:
        """Return where a window's output meets the box of score k, and ``ĝ_w ∂s/∂P`` there: (channels or 1, *part).

        Args:
            k: number of the score.
            window: number of the window.
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
        """Return ``∂s/∂P`` at the image of each score that is not linear; a linear one is cut from its mask."""
        return [None if s.linear else s.cotangent(p) for s, p in zip(self.scores, self.image_predictions())]

    def _batch_cotangents(
        self,
        windows: Sequence[int],
        sources: Sequence[int],
        whole: list[Tensor | None] | None,
        predictions: list[Tensor] | None,
    ) -> list[Tensor | None]:
        """Return ``ĝ_w ∂s/∂P`` per target: (n, R, *out_roi), None where the target sees none of the windows."""
        cotangents: list[Tensor | None] = []
        for k, (score, seen) in enumerate(zip(self.scores, self.score_windows)):
            if not set(windows) & set(seen):
                cotangents.append(None)
                continue
            at: dict[int, Tensor | None] = {}
            if predictions is not None and not score.linear:
                at = {source: score.cotangent(predictions[k][source]) for source in set(sources)}
            elif whole is not None:
                at = dict.fromkeys(sources, whole[k])
            shape = (len(windows), len(self.channels), *self.grid.out_roi)
            total = torch.zeros(shape, dtype=self.image.dtype, device=self.model.device)
            for j, (w, source) in enumerate(zip(windows, sources)):
                if w in seen:
                    inside, part = self.weighted_cotangent(k, w, at.get(source))
                    index: tuple[Any, ...] = (j, self.rows[k], *inside)
                    total[index] = part.to(total)
            cotangents.append(total)
        return cotangents
