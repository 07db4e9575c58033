"""A network that sees a volume through windows: forward passes, and loops in batches that fit into memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model, halved, out_of_memory
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.engine.windows.plan import Call, WindowPlan, picked
from esegeta_monai.errors import MethodError
from esegeta_monai.utils.distributed import Summed

__all__ = ["Jobs", "WindowedNetwork"]

Jobs = Sequence[tuple[int, int]]
"""Pairs (volume, window)."""


@dataclass(frozen=True, eq=False)
class WindowedNetwork:
    """A network that sees a volume through windows.

    Attributes:
        model: the network, frozen (see `esegeta_monai.engine.network.state.frozen`).
        image: (C, *spatial), on the device where volumes are stored.
        plan: the windows.
        condition: MONAI's ``condition`` volume (C, *spatial), cut to windows like the image; None: the network has
            none.
        context: progress, processes, checkpoint and batch size of the run.
    """

    model: Model
    image: Tensor
    plan: WindowPlan
    _: KW_ONLY
    condition: Tensor | None = None
    context: RunContext = field(default_factory=RunContext)

    @property
    def channels(self) -> list[int]:
        """Output channels that are read; empty: all of them."""
        return []

    @property
    def window_batch(self) -> int:
        """Windows per forward pass."""
        return self.context.window_batch or self.plan.batch_size

    def run(self, x: Tensor, windows: Sequence[int], *, all_channels: bool = False, counted: bool = True) -> Tensor:
        """Run the network on windows.

        Args:
            x: (n, C, *roi).
            windows: their numbers in the plan.
            all_channels: return all output channels, not only those that are read.
            counted: count the passes; False for a pass that only checks another one.

        Returns:
            (n, R, *out_roi), or (n, K, *out_roi) with ``all_channels``; M·K channels where members are kept apart.
        """
        parts, done = [], 0
        for call, alike in itertools.groupby(windows, self.plan.call):
            some = list(alike)
            parts.append(self._run_call(x[done : done + len(some)], some, call))
            done += len(some)
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        if counted:
            self.context.progress.passed(len(windows))
        self.check_output(out)
        if all_channels or len(self.channels) in (0, out.shape[1]):
            return out
        return out[:, picked(self.channels)]

    def _run_call(self, x: Tensor, windows: Sequence[int], call: Call) -> Tensor:
        """Run the network on windows (n, C, *roi) that share a call; the view is undone in the output (n, K, …)."""
        coordinates = [self.plan.coordinates(w) for w in windows] if self.plan.with_coord else None
        condition = None
        if self.condition is not None:
            condition = torch.stack([self.plan.cut(self.condition, w) for w in windows]).to(self.model.device)
        dims = len(self.plan.roi)
        if call.turned:
            x, condition = call.apply(x, dims), None if condition is None else call.apply(condition, dims)
        self.model.load(call.member)
        out = self.model(x, slice_axis=self.plan.slice_axis, coordinates=coordinates, condition=condition)
        out = call.undo(out, dims) if call.turned and out.ndim == x.ndim else out
        if not self.plan.apart:
            return out
        before, after = call.member, self.plan.member_count - 1 - call.member
        channels = out.shape[1]
        return nn.functional.pad(out, (0, 0) * (out.ndim - 2) + (before * channels, after * channels))

    def check_output(self, out: Tensor) -> None:
        """Check an output of the network (n, K, *out_roi); nothing is known of it here."""

    def window(self, window: int) -> Tensor:
        """Return one window of the image as a batch (1, C, *roi) on the network's device."""
        return self.plan.cut(self.image, window)[None].to(self.model.device)

    def vjp(self, out: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, *, retain: bool) -> list[Tensor | None]:
        """Compute one vector-Jacobian product; None for inputs that ``out`` does not depend on.

        Under float16 autocast the cotangent is scaled until nothing overflows.

        Args:
            out: output of the network (n, R, *out_roi).
            inputs: tensors that it was computed from.
            cotangent: (n, R, *out_roi).
            retain: keep the graph for another call.

        Raises:
            MethodError: an operation on the path has no derivative, or its input was overwritten.
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
        *,
        sums: Sequence[Tensor | Summed] | None = None,
        whole_windows: bool = False,
        turn: int | None = None,
    ) -> None:
        """Run (volume, window) jobs in batches; halve a batch that does not fit into memory and run it again.

        Args:
            groups: jobs that may share a batch.
            run: called with the windows of each batch, the volume of each, and True for the first batch of the loop.
            sums: tensors of any shape that ``run`` adds into, see `esegeta_monai.engine.objective.Objective.each`.
            whole_windows, turn: see there.
        """
        if sums is None:
            self._run(groups, run)
            return
        processes = self.context.processes
        with processes.summed(sums) if turn is None else nullcontext():
            shares = [processes.share_windows(g) if whole_windows else processes.share(g, turn or 0) for g in groups]
            self._run(shares, run)

    def _run(self, groups: Sequence[Jobs], run: Callable[[list[int], list[int], bool], None]) -> None:
        for number, group in enumerate(groups):
            done = 0
            while done < len(group):
                self.context.progress.check()
                part = group[done : done + self.window_batch]
                call = self.plan.call(part[0][1])
                part = list(itertools.takewhile(lambda job: self.plan.call(job[1]) is call, part))  # noqa: B023
                try:
                    run([w for _, w in part], [p for p, _ in part], number == done == 0)
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    self.shrink(len(part), error)
                    continue
                done += len(part)

    def shrink(self, tried: int, error: BaseException) -> None:
        """Halve the window batch after memory ran out, and warn.

        Args:
            tried: windows in the batch that did not fit.
            error: the error.

        Raises:
            MethodError: the batch had only one window.
        """
        self.context.window_batch = halved(tried, self.plan.roi, error)
        self.context.progress.warn(f"out of memory with {tried} windows per batch: continued with {tried // 2}")


def _gradients(out: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, retain: bool) -> list[Tensor | None]:
    """Call autograd; replace its error for a network without derivative by one that names a remedy."""
    try:
        return list(torch.autograd.grad(out, inputs, cotangent, retain_graph=retain, allow_unused=True))
    except MemoryError as error:
        raise torch.OutOfMemoryError(f"not enough memory: {error or 'MemoryError'}") from error
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        text = " ".join(str(error).split())
        raise MethodError(
            f"the network cannot be differentiated ({text[:200]}): correct that operation (in place: set "
            "inplace=False), or use a perturbation method such as Occlusion"
        ) from error
