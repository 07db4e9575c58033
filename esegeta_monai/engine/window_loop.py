"""A network behind the windows of a volume: passes through it, and loops over windows that fit into memory.

Nothing here knows of targets: `esegeta_monai.engine.objective` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from esegeta_monai.engine.dry_run import Timed
from esegeta_monai.engine.network.model import Model, out_of_memory
from esegeta_monai.engine.progress import Monitor
from esegeta_monai.engine.windows.plan import WindowPlan, picked
from esegeta_monai.errors import MethodError
from esegeta_monai.utils.distributed import Ranks, Summed

__all__ = ["Windowed"]

Jobs = Sequence[tuple[int, int]]
"""(volume, window)."""


class Windowed:
    """A network behind the windows of a volume.

    Args:
        model: the network, frozen (see `esegeta_monai.engine.network.state.frozen`).
        image: (C, *spatial), on the device where volumes live.
        plan: the windows.
        monitor: counts passes, shows progress, keeps the time limit.
        condition: MONAI's ``condition`` volume (C, *spatial), cut to windows beside the image.
        ranks: the processes that compute this case together, each with the same arguments; None: this one alone.

    Attributes:
        read: the channels of the output that are kept; all where there are none.
        window_batch: windows that go through the network at once.
    """

    def __init__(
        self,
        model: Model,
        image: Tensor,
        plan: WindowPlan,
        *,
        monitor: Monitor | None = None,
        condition: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.image, self.plan, self.condition = model, image, plan, condition
        self.monitor, self.ranks = monitor or Monitor(), ranks or Ranks()
        self.read: list[int] = []
        self.window_batch = plan.batch_size

    def run(self, x: Tensor, windows: Sequence[int]) -> Tensor:
        """The network on windows x (n, C, *roi): (n, R, *out_roi), the channels that are read."""
        coordinates = [self.plan.coordinates(w) for w in windows] if self.plan.with_coord else None
        condition = None
        if self.condition is not None:
            condition = torch.stack([self.plan.cut(self.condition, w) for w in windows]).to(self.model.device)
        out = self.model(x, slice_axis=self.plan.slice_axis, coordinates=coordinates, condition=condition)
        self.monitor.passed(len(windows))
        if len(self.read) in (0, out.shape[1]):
            return out
        return out[:, picked(self.read)]

    def vjp(self, out: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, *, retain: bool) -> list[Tensor | None]:
        """One vector-Jacobian product, None for inputs that ``out`` does not depend on.

        Under float16 autocast the cotangent is scaled until nothing overflows.

        Raises:
            MethodError: an operation on the path has no derivative, or what it needs was overwritten.
        """
        cotangent = cotangent.to(out.dtype)
        if self.model.autocast_dtype != torch.float16:
            return _gradients(out, inputs, cotangent, retain)
        peak = float(cotangent.abs().max())
        scale = 2.0**12 / peak if peak > 0 else 1.0
        for _ in range(8):
            grads = _gradients(out, inputs, cotangent * scale, True)
            if all(g is None or bool(torch.isfinite(g).all()) for g in grads):
                return [None if g is None else g / scale for g in grads]
            scale /= 16
        raise MethodError("float16 gradients overflow at every scale: switch amp off, or use bfloat16 (amp_kwargs)")

    def loop(
        self,
        groups: Sequence[Jobs],
        run: Callable[[list[int], list[int], bool], None],
        timed: Timed,
        sums: Sequence[Tensor | Summed] | None,
        turn: int | None,
    ) -> None:
        """Runs (volume, window) jobs in batches; a batch that does not fit in memory is halved and done again.

        Args:
            groups: jobs that may share a batch.
            run: called with the windows of each batch, the volume of each, and whether it is the first of the loop.
            timed: what a dry run wants to know.
            sums, turn: see `esegeta_monai.engine.objective.Objective.each`.
        """
        if sums is None:
            self._run(groups, run, timed)
            return
        with self.ranks.summed(sums) if turn is None else nullcontext():
            self._run([self._share(g, timed.whole_windows, turn or 0) for g in groups], run, timed)

    def _share(self, jobs: Jobs, whole_windows: bool, turn: int) -> list[tuple[int, int]]:
        if not whole_windows:
            return self.ranks.share(jobs, turn)
        mine = set(self.ranks.share(sorted({w for _, w in jobs})))
        return [j for j in jobs if j[1] in mine]

    def _run(self, groups: Sequence[Jobs], run: Callable[[list[int], list[int], bool], None], timed: Timed) -> None:
        for number, group in enumerate(groups):
            done = 0
            loop = timed.loop(self.monitor.pace, number, group)
            while done < len(group):
                if loop is not None and timed.may_end(group, done) and loop.enough(done):
                    break
                self.monitor.check()
                part = group[done : done + self.window_batch]
                try:
                    run([w for _, w in part], [p for p, _ in part], number == done == 0)
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    self.shrink(len(part), error)
                    continue
                done += len(part)
            if loop is not None:
                loop.end(done, functools.partial(len, group))

    def shrink(self, tried: int, error: RuntimeError) -> None:
        """Halves the window batch after memory ran out, and records it.

        Raises:
            MethodError: already one window.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if tried == 1:
            raise MethodError(
                f"out of memory with one window of {self.plan.roi}: use amp=True, a smaller window, or device='cpu'"
            ) from error
        self.window_batch = tried // 2
        self.monitor.warn(f"out of memory with {tried} windows a batch: continued with {self.window_batch}")


def _gradients(out: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, retain: bool) -> list[Tensor | None]:
    """What torch says of a network that it cannot differentiate is an error of ours, with the way out."""
    try:
        return list(torch.autograd.grad(out, inputs, cotangent, retain_graph=retain, allow_unused=True))
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        said = " ".join(str(error).split())
        raise MethodError(
            f"the network cannot be differentiated ({said[:200]}): mend that operation (in place: set inplace=False), "
            "or use a perturbation method such as Occlusion"
        ) from error
