"""Compare all gradient and CAM methods together with the most expensive one, and each with a bare loop of its passes.

    python benchmarks/methods.py [--window 32] [--along 8] [--repeats 3] [--table benchmarks/results/methods.md]

Times are CPU seconds of the process with one thread (independent of other load), the minimum of several rounds in
which all methods take turns. A *bare loop* makes only the passes that the method needs, through windows of the same
shape: forward without a graph, forward and backward to the layer, forward and backward to the input. A method may also
pass one or two windows once per run, to choose its baseline or to compare the output under its rules with the plain
one. These *looks* are counted separately and are not part of the bare loop. (The windows fill whole batches, so that
no other pass is as small.) The layer is given; finding it is a separate line. Methods that cannot share passes (paths,
noise, rules) are measured alone.

Freed memory is kept by the process (`mallopt`). Otherwise glibc may return it to the kernel, depending on where the
heap ends, and the page faults cost a fifth of a pass of 32³ windows, in either measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from esegeta_monai.engine.default_layer import default_layer
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.methods import (
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    GuidedBackprop,
    HiResCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerCam,
    LayerGradCam,
    LayerGradientXActivation,
    LinearApproximation,
    Method,
    Saliency,
    SmoothGrad,
    VanillaBackprop,
    XGradCam,
    run_together,
)
from esegeta_monai.targets import Case, MultiClassMask


def sharing(layer: str) -> list[Method]:
    """Return the methods that share passes."""
    return [
        *(Saliency(), VanillaBackprop(), InputXGradient()),
        *(GradCam(layer), GradCamPlusPlus(layer), HiResCam(layer), LayerCam(layer), XGradCam(layer), EigenCam(layer)),
        LinearApproximation(layer),
    ]


def alone(layer: str) -> list[Method]:
    """Return the methods that are measured one by one only."""
    return [
        *(LayerActivation(layer), LayerGradCam(layer), LayerGradientXActivation(layer)),
        IntegratedGradients(n_steps=2),
        SmoothGrad(n_samples=2),
        GuidedBackprop(),
    ]


#: Kinds of passes, in the method and in the bare loop.
FORWARD, TO_LAYER, TO_INPUT, LOOK = "forward", "to the layer", "to the input", "look"
BATCH = 4


def keep_freed_memory() -> None:
    """Tell glibc not to return freed memory to the kernel; without glibc do nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mapping for a large tensor
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Counted(nn.Module):
    """A network that counts windows by the kind of pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.passes: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < BATCH:
            self.passes[LOOK] += len(x)
            return self.network(x)
        if not torch.is_grad_enabled():
            self.passes[FORWARD] += len(x)
            return self.network(x)
        self.passes[TO_LAYER] += len(x)
        if x.requires_grad:
            with torch._C.DisableTorchFunction():  # the rule engine refuses hooks on tensors
                x.register_hook(self._reached)
        return self.network(x)

    def _reached(self, gradient: Tensor) -> None:
        """Count a backward pass that has reached the input."""
        self.passes[TO_LAYER] -= len(gradient)
        self.passes[TO_INPUT] += len(gradient)


class Bench:
    """A volume with overlapping windows, and the timing of calls on it."""

    def __init__(self, window: int, along: int) -> None:
        torch.manual_seed(0)
        self.network = Counted(UNet(3, 1, 2, (16, 32, 64), (2, 2), num_res_units=1, norm="batch")).eval()
        step = window * 3 // 4
        self.image = torch.randn(1, window + step, window + step, window + (along - 1) * step)
        self.inferer = SlidingWindowInferer((window,) * 3, BATCH, 0.25, "gaussian")
        with torch.no_grad():
            self.prediction = self.inferer(self.image[None], self.network)[0]
        self.scores = MultiClassMask(1).bind(self.prediction, Case())
        self.plan = plan_windows(self.inferer, self.image.shape[1:])
        self.layer = default_layer(self.objective())
        assert len(self.plan) % BATCH == 0, "the last batch would be counted as looks"
        self.windows = torch.stack([self.plan.cut(self.image, w) for w in range(BATCH)])
        with torch.no_grad():
            self.cotangent = torch.randn_like(self.network(self.windows))

    def objective(self) -> Objective:
        """Return a new objective without results of an earlier run."""
        model = Model(self.network, torch.device("cpu"))
        return Objective(model, self.image, self.plan, self.scores, self.prediction)

    def ours(self, methods: list[Method]) -> Callable[[], None]:
        """Return a function that runs methods together."""

        def call() -> None:
            with frozen(self.network):
                for outcome in run_together(methods, self.objective()):
                    if outcome.error is not None:
                        raise outcome.error

        return call

    def search(self) -> None:
        """Find the default layer."""
        with frozen(self.network):
            default_layer(self.objective())

    def bare(self, passes: Counter[str]) -> Callable[[], None]:
        """Return a function that makes only the needed passes, in batches."""
        network, layer = self.network.network, self.network.get_submodule(self.layer)

        def one(kind: str) -> None:
            x = self.windows
            if kind == FORWARD:
                with torch.no_grad():
                    network(x)
                return
            kept: list[Tensor] = []

            def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
                kept.append(output.detach().requires_grad_())
                return kept[-1]

            handle = layer.register_forward_hook(hook) if kind == TO_LAYER else None
            leaf = x.clone().requires_grad_() if kind == TO_INPUT else x
            out = network(leaf)
            torch.autograd.grad(out, kept if handle else [leaf], self.cotangent)
            if handle:
                handle.remove()

        def call() -> None:
            with frozen(self.network):
                for kind, n in passes.items():
                    if kind != LOOK:
                        assert n % BATCH == 0
                        for _ in range(n // BATCH):
                            one(kind)

        return call

    def passes(self, methods: list[Method]) -> Counter[str]:
        """Count the passes that methods make together."""
        self.network.passes.clear()
        self.ours(methods)()
        return Counter(self.network.passes)


def seconds(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return CPU seconds of each call, the minimum of rounds in which all take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--along", type=int, default=8, help="windows along the longest side, an even number")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    bench = Bench(args.window, args.along)
    shares = sharing(bench.layer)
    groups = {str(m.name): [m] for m in (*shares, *alone(bench.layer))}
    groups["all that share, together"] = shares
    passes = {name: bench.passes(methods) for name, methods in groups.items()}
    calls: dict[str, Callable[[], None]] = {}
    for name, methods in groups.items():
        calls[name] = bench.ours(methods)
        calls[f"bare {name}"] = bench.bare(passes[name])
    calls["search"] = bench.search
    took = seconds(calls, args.repeats)
    shared = [str(m.name) for m in shares]
    costliest = max(shared, key=lambda name: took[name])
    together = took["all that share, together"]
    shape = " x ".join(map(str, bench.image.shape[1:]))
    lines = [
        f"{shape}, {args.window}³ windows ({len(bench.plan)}), MONAI UNet (batch norm, PReLU), layer "
        f"{bench.layer!r}, one thread, torch {torch.__version__}, {platform.machine()}; "
        f"CPU seconds, minimum of {args.repeats}",
        "",
        "| method | forward | to the layer | to the input | looks | seconds | bare loop | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in groups:
        count, ours, loop = passes[name], took[name], took[f"bare {name}"]
        lines.append(
            f"| {name} | {count[FORWARD]} | {count[TO_LAYER]} | {count[TO_INPUT]} | {count[LOOK]} | "
            f"{ours:.3f} | {loop:.3f} | {ours / loop:.2f} |"
        )
    lines += [
        "",
        f"All {len(shares)} methods that share passes, together: {together / took[costliest]:.2f} times the costliest "
        f"({costliest}), {together / sum(took[name] for name in shared):.2f} times the sum of all.",
        "",
        f"Finding the default layer: {took['search']:.3f} s, one pass of one window, once.",
    ]
    print("\n".join(lines))
    if args.table:
        args.table.write_text(
            "# Methods together and against bare loops\n\n`python benchmarks/methods.py`\n\n" + "\n".join(lines) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
