"""How much faster several processes explain one volume together, each with one thread.

    python benchmarks/ranks.py [--ranks 2] [--size 96] [--window 48]

In one run: the first process alone while the others wait, then all together on the one volume, then each process the
whole volume for itself, all at the same time. The last says what the machine gives: cores share memory and caches, and
where each of two processes is slower beside the other, no division of the work can be twice as fast. The machine must
have a free core for each process, else the figures say nothing.
"""

from __future__ import annotations

import argparse
import os
import socket
import time

import torch
import torch.multiprocessing as mp
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.methods import METHODS
from esegeta_monai.ranks import process_group
from esegeta_monai.targets import MultiClassMask

METHODS_TRIED = (
    "Saliency",
    "IntegratedGradients(n_steps=4, baseline='zero')",
    "GradCam(relu=False)",
    "Occlusion(window=24)",
)


def explain(explainer: Explainer, image: Tensor, method: str, repeats: int) -> tuple[float, Tensor]:
    """Least seconds of some runs, and the map."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        (found,) = explainer(image, METHODS.create_all(method), [MultiClassMask(1)])
        times.append(time.perf_counter() - began)
    assert found.map is not None
    return min(times), found.map.as_tensor()


def work(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(args.ranks))
    os.environ.update(LOCAL_RANK=str(rank))
    torch.manual_seed(0)
    network = UNet(3, 1, 3, channels=(16, 32, 64), strides=(2, 2), norm="batch").eval()
    image = torch.rand(1, 1, *[args.size] * 3, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer([args.window] * 3, 2, 0.25, "gaussian")
    with process_group("gloo") as ranks:
        if rank == 0:
            head = f"{'one':>8}{'together':>10}{'ratio':>8}{'each alone':>12}{'ceiling':>9}{'difference':>12}"
            print(f"{'method':<50}{head}", flush=True)
        for method in METHODS_TRIED:
            alone: tuple[float, Tensor] | None = None
            if rank == 0:
                alone = explain(Explainer(network, inferer), image, method, args.repeats)
            ranks.gather(None)
            seconds, found = explain(Explainer(network, inferer, distributed=True), image, method, args.repeats)
            ranks.gather(None)
            mine, _ = explain(Explainer(network, inferer), image, method, args.repeats)
            beside = max(ranks.gather(mine))
            if alone is not None:
                one = alone[0]
                difference = float((found - alone[1]).abs().max() / alone[1].abs().max())
                print(
                    f"{method:<50}{one:>7.2f}s{seconds:>9.2f}s{one / seconds:>8.2f}"
                    f"{beside:>11.2f}s{args.ranks * one / beside:>9.2f}{difference:>12.1e}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--size", type=int, default=96, help="edge of the volume in voxels")
    parser.add_argument("--window", type=int, default=48, help="edge of a window")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
