"""All gradient and CAM methods together against the dearest single one, and each against a bare loop of its passes.

    python benchmarks/methods.py [--size 48] [--window 32] [--repeats 3] [--table benchmarks/results/methods.md]

CPU seconds of the process with one thread (so that a busy machine does not matter), the minimum of several rounds in
which all take turns. A *bare loop* makes the same passes through the same windows and nothing else: forward passes
without a graph, forward and backward down to the layer that is looked at, forward and backward down to the input, as
often as the method was seen to make them. Methods that cannot share (paths, noise, rules) are measured alone.
"""

from __future__ import annotations

import argparse
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

from esegeta_monai.layers import default_layer
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
from esegeta_monai.network import Model, frozen
from esegeta_monai.objective import Objective
from esegeta_monai.targets import Case, MultiClassMask
from esegeta_monai.windows import plan_windows

SHARING: list[Method] = [
    *(Saliency(), VanillaBackprop(), InputXGradient()),
    *(GradCam(), GradCamPlusPlus(), HiResCam(), LayerCam(), XGradCam(), EigenCam()),
    LinearApproximation(),
]
ALONE: list[Method] = [
    *(LayerActivation(), LayerGradCam(), LayerGradientXActivation()),
    IntegratedGradients(n_steps=2),
    SmoothGrad(n_samples=2),
    GuidedBackprop(),
]
#: What a pass is: how it was called, or how the bare loop calls it.
FORWARD, TO_LAYER, TO_INPUT = "forward", "to the layer", "to the input"


class Counted(nn.Module):
    """A network that counts windows by the kind of pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.passes: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.passes[FORWARD] += len(x)
            return self.network(x)
        self.passes[TO_LAYER] += len(x)
        with torch._C.DisableTorchFunction():  # the rule engine refuses hooks on tensors
            x.register_hook(self._reached)
        return self.network(x)

    def _reached(self, gradient: Tensor) -> None:
        """The backward pass has come down to the input."""
        self.passes[TO_LAYER] -= len(gradient)
        self.passes[TO_INPUT] += len(gradient)


class Bench:
    """A volume behind overlapping windows, and the stopwatch."""

    def __init__(self, size: int, window: int) -> None:
        torch.manual_seed(0)
        self.network = Counted(UNet(3, 1, 2, (16, 32, 64), (2, 2), num_res_units=1, norm="batch")).eval()
        self.image = torch.randn(1, size, size, size)
        self.inferer = SlidingWindowInferer((window,) * 3, 4, 0.25, "gaussian")
        with torch.no_grad():
            self.prediction = self.inferer(self.image[None], self.network)[0]
        self.scores = MultiClassMask(1).bind(self.prediction, Case())
        self.plan = plan_windows(self.inferer, self.image.shape[1:])
        self.layer = default_layer(self.objective())
        self.windows = torch.stack([self.plan.cut(self.image, w) for w in range(4)])
        with torch.no_grad():
            self.cotangent = torch.randn_like(self.network(self.windows))

    def objective(self) -> Objective:
        """A fresh one: nothing is remembered from an earlier run."""
        model = Model(self.network, torch.device("cpu"))
        return Objective(model, self.image, self.plan, self.scores, self.prediction)

    def ours(self, methods: list[Method]) -> Callable[[], None]:
        """A call that runs methods together."""

        def call() -> None:
            with frozen(self.network):
                for outcome in run_together(methods, self.objective()).values():
                    if isinstance(outcome, Exception):
                        raise outcome

        return call

    def bare(self, passes: Counter[str]) -> Callable[[], None]:
        """A call that makes the same passes in batches of four, and nothing else."""
        network, layer = self.network.network, self.network.get_submodule(self.layer)

        def one(kind: str, n: int) -> None:
            x = self.windows[:n]
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
            torch.autograd.grad(out, kept if handle else [leaf], self.cotangent[:n])
            if handle:
                handle.remove()

        def call() -> None:
            with frozen(self.network):
                for kind, n in passes.items():
                    for _ in range(n // 4):
                        one(kind, 4)
                    if n % 4:
                        one(kind, n % 4)

        return call

    def passes(self, methods: list[Method]) -> Counter[str]:
        """The passes that methods make together."""
        self.network.passes.clear()
        self.ours(methods)()
        return Counter(self.network.passes)


def seconds(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """CPU seconds of each call, the minimum of rounds in which all take turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", type=Path, help="write the table there too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.size, args.window)
    groups = {str(m.name): [m] for m in (*SHARING, *ALONE)}
    groups["all that share, together"] = SHARING
    passes = {name: bench.passes(methods) for name, methods in groups.items()}
    calls: dict[str, Callable[[], None]] = {}
    for name, methods in groups.items():
        calls[name] = bench.ours(methods)
        calls[f"bare {name}"] = bench.bare(passes[name])
    took = seconds(calls, args.repeats)
    shared = [str(m.name) for m in SHARING]
    dearest = max(shared, key=lambda name: took[name])
    together = took["all that share, together"]
    lines = [
        f"{args.size}³, {args.window}³ windows ({len(bench.plan)}), MONAI UNet (batch norm, PReLU), layer "
        f"{bench.layer!r}, one thread, torch {torch.__version__}, {platform.machine()}; "
        f"CPU seconds, minimum of {args.repeats}",
        "",
        "| method | forward | to the layer | to the input | seconds | bare loop | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in groups:
        count, mine, loop = passes[name], took[name], took[f"bare {name}"]
        lines.append(
            f"| {name} | {count[FORWARD]} | {count[TO_LAYER]} | {count[TO_INPUT]} | {mine:.3f} | {loop:.3f} | "
            f"{mine / loop:.2f} |"
        )
    lines += [
        "",
        f"All {len(SHARING)} that share, together: {together / took[dearest]:.2f} times the dearest of them alone "
        f"({dearest}), {together / sum(took[name] for name in shared):.2f} times the sum of all alone.",
    ]
    print("\n".join(lines))
    if args.table:
        args.table.write_text(
            "# Methods together, and against bare loops\n\n`python benchmarks/methods.py`\n\n" + "\n".join(lines) + "\n"
        )


if __name__ == "__main__":
    main()
