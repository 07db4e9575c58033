"""Measure peak memory and time of a gradient map over windows, mirrored views and members of an ensemble.

    python benchmarks/ensembles.py [--window 48] [--repeats 3] [--threads 1]

Each row runs in its own process. The script prints the peak resident memory above that of a process with torch, MONAI
and the members loaded, and the processor time relative to the bare passes: one forward and one backward pass of every
window, member and view in a plain loop, nothing else. The two are timed in turn, and the median ratio is given, since
other processes may run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time

ROWS = [(96, 1, 1), (96, 1, 8), (96, 5, 1)]
"""Size of the volume, members, views."""


def measure(size: int, members: int, views: int, window: int, repeats: int, threads: int) -> dict[str, float]:
    """Measure one row: peak in bytes above the loaded process, and processor times in seconds."""
    import resource

    import torch
    from monai.inferers import SlidingWindowInferer
    from monai.networks.nets import UNet

    from esegeta_monai import Explainer
    from esegeta_monai.explain.ensemble import EnsembleInferer

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.set_num_threads(threads)
    networks = []
    for seed in range(members):
        torch.manual_seed(seed)
        networks.append(UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch").eval())
    inner = SlidingWindowInferer((window,) * 3, 2, 0.25, "gaussian")
    inferer = EnsembleInferer(inner, networks, (0, 1, 2) if views == 8 else ())
    explainer = Explainer(networks[0], inferer, checks=False)
    image = torch.randn(1, 1, size, size, size)
    target = f"Box(1, (0, 0, 0), ({size}, {size}, {size}))"
    predicted = torch.zeros(1, 2, size, size, size)  # the score is linear and its mask a box: F is not read from it
    plan = inferer.declared_windows((size,) * 3, torch.float32)
    before = peak()

    def ours() -> float:
        began = time.process_time()
        (attribution,) = explainer(image, ["VanillaBackprop"], [target], prediction=predicted)
        assert attribution.record["window_passes"] == len(plan)
        return time.process_time() - began

    def bare() -> float:
        """Run every window of every member and view forward and backward, in batches of two."""
        began = time.process_time()
        flips = [c for n in range(4) for c in itertools.combinations((2, 3, 4), n)][:views]
        places = plan.slices[: len(plan) // (members * views)]
        for network in networks:
            for parameter in network.parameters():
                parameter.requires_grad_(False)
            for view in flips:
                for first in range(0, len(places), 2):
                    x = torch.cat([image[(..., *place)] for place in places[first : first + 2]])
                    x = x.flip(view).requires_grad_(True)
                    torch.autograd.grad(network(x)[:, 1].sum(), x)
        return time.process_time() - began

    ours()
    used = peak() - before
    bare()
    ratios, seconds = [], []
    for _ in range(repeats):
        a, b, c = bare(), ours(), bare()
        ratios.append(2 * b / (a + c))
        seconds.append(b)
    return {
        "peak": used,
        "windows": len(plan),
        "ratio": statistics.median(ratios),
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=3, type=int, metavar=("SIZE", "MEMBERS", "VIEWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args.window, args.repeats, args.threads)))
        return
    print(f"{args.window}³ windows, batch 2, float32, {args.threads} thread(s)")
    print(f"{'size':>5} {'members':>8} {'views':>6} {'passes':>7} {'peak MB':>8} {'seconds':>8} {'to bare passes':>15}")
    for size, members, views in ROWS:
        command = [sys.executable, __file__, "--window", str(args.window), "--threads", str(args.threads)]
        command += ["--repeats", str(args.repeats), "--one", str(size), str(members), str(views)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout)
        print(
            f"{size:5d} {members:8d} {views:6d} {row['windows']:7d} {row['peak'] / 1e6:8.1f} {row['seconds']:8.1f} "
            f"{row['ratio']:15.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
