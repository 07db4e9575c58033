"""Compare Occlusion with Captum's around MONAI's own inferer, in one run.

    python benchmarks/occlusion.py [--size 128] [--window 48] [--occluder 32] [--stride 32] [--targets lesion,organ]
                                   [--no-captum] [--threads 2] [--repeats 3] [--device cpu]

For each target the script prints seconds, window passes, the largest difference of the maps, the ratio of passes and of
times, and our time relative to a bare loop: the same number of window passes through the network and nothing else. Both
are the least of several repeats, taken in turns. With one thread on the CPU, the time is that of the process
(independent of other load), otherwise wall-clock time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from captum.attr import Occlusion as CaptumOcclusion
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.methods import Occlusion, run
from esegeta_monai.targets import Box, Case, MultiClassMask


class Counted(torch.nn.Module):
    """A network that counts its windows."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.windows = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.windows += len(x)
        return self.network(x)


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Return the time of a call and its result."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, result


def naive_passes(size: int, occluder: int, stride: int, windows: int) -> int:
    """Return the window passes of an occlusion that predicts the whole volume once, and for each occluder."""
    steps = len(range(0, max(size - occluder, 0) + stride, stride))
    return (steps**3 + 1) * windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--occluder", type=int, default=32)
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--targets", default="lesion,organ")
    parser.add_argument("--output", default="logit", choices=["logit", "probability"])
    parser.add_argument("--no-captum", action="store_true", help="compute its number of passes instead of running it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    network = Counted(UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)).eval().to(device)
    image = torch.randn(1, args.size, args.size, args.size, device=device)
    inferer = SlidingWindowInferer((args.window,) * 3, sw_batch_size=4, overlap=0.25, mode="gaussian")
    with torch.no_grad():
        prediction = inferer(image[None], network)[0]
    plan = plan_windows(inferer, image.shape[1:])
    middle = args.size // 2
    targets = {
        "lesion": Box(1, (middle - 4,) * 3, (middle + 8,) * 3, output=args.output),
        "organ": MultiClassMask(1, output=args.output),
    }
    shape = f"{args.size}³, {args.window}³ windows ({len(plan)}), occluder {args.occluder}³, stride {args.stride}"
    print(f"{shape}, {args.output}, {device}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'target':8} {'who':8} {'seconds':>9} {'passes':>8}  {'ratios'}")
    for name in args.targets.split(","):
        scores = targets[name].bind(prediction, Case())
        objective = Objective(Model(network, device), image, plan, scores, prediction)
        method = Occlusion(window=args.occluder, stride=args.stride, baseline=0.0)
        with frozen(network):
            with torch.inference_mode():  # warm up
                network(torch.zeros(4, 1, *plan.roi, device=device))
            network.windows = 0
            explained = run(method, objective)
            passes = network.windows
            batches = [4] * (passes // 4) + ([passes % 4] if passes % 4 else [])
            windows = torch.randn(4, 1, *plan.roi, device=device)

            def bare(batches=batches, windows=windows) -> None:
                with torch.inference_mode():
                    for n in batches:
                        network(windows[:n])

            times = []
            for _ in range(args.repeats):
                objective.memo("window scores", dict).clear()
                times.append((seconds(lambda o=objective, m=method: run(m, o), device)[0], seconds(bare, device)[0]))
            ours, loop = map(min, zip(*times))
        print(f"{name:8} {'ours':8} {ours:9.2f} {passes:8d}  {ours / loop:.3f} of the bare loop ({loop:.2f} s)")
        predicted = naive_passes(args.size, args.occluder, args.stride, len(plan))
        if args.no_captum:
            print(f"{name:8} {'naive':8} {'':>9} {predicted:8d}  passes ratio {predicted / passes:.1f}")
            continue

        def score(x: Tensor, score=scores[0]) -> Tensor:
            rows = [score.value(score.crop(inferer(one[None], network)[0])) for one in x]
            return torch.stack(rows)

        network.windows = 0
        captum = CaptumOcclusion(score)
        with torch.no_grad(), frozen(network):
            peer_s, reference = seconds(
                lambda c=captum: c.attribute(
                    image[None], sliding_window_shapes=(1, *(args.occluder,) * 3), strides=(1, *(args.stride,) * 3)
                ),
                device,
            )
        difference = float((explained.maps[0] - reference[0]).abs().max() / reference.abs().max())
        ratio = network.windows / passes
        print(
            f"{name:8} {'captum':8} {peer_s:9.2f} {network.windows:8d}  time ratio {peer_s / ours:.1f}, passes ratio "
            f"{ratio:.1f} (time / passes {peer_s / ours / ratio:.2f}), map difference {difference:.1e}"
        )


if __name__ == "__main__":
    main()
