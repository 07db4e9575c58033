"""Measure the peak memory of Saliency and IntegratedGradients from 64³ to 192³: a window term plus a few volumes.

    python benchmarks/memory.py [--sizes 64,96,128,160,192] [--steps 4] [--window 48] [--threads 2]

Every measurement runs in its own process. The script prints the peak resident memory in MB above that of a process with
torch, MONAI and the network loaded, the number of windows, and the least-squares line through the peaks. Its slope is
the number of float32 volumes in memory, its intercept the window term.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import numpy as np


def measure(method: str, size: int, window: int, steps: int, threads: int) -> dict[str, float]:
    """Measure the peak memory of one method on one volume, in bytes above the loaded process."""
    import resource

    import torch
    from monai.inferers import SlidingWindowInferer
    from monai.networks.nets import UNet

    from esegeta_monai import Explainer
    from esegeta_monai.methods import IntegratedGradients, Saliency
    from esegeta_monai.targets import MultiClassMask

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, norm="batch").eval()
    explainer = Explainer(network, SlidingWindowInferer((window,) * 3, 2, 0.25, "gaussian"))
    chosen = {
        "Saliency": Saliency(),
        "IntegratedGradients": IntegratedGradients(n_steps=steps, baseline="zero"),
        "nothing": None,
    }[method]
    before = peak()
    if chosen is None:
        return {"peak": 0.0, "passes": 0}
    image = torch.randn(1, 1, size, size, size)
    (attribution,) = explainer(image, [chosen], [MultiClassMask(1)])
    return {
        "peak": peak() - before,
        "windows": attribution.record["windows_total"],
        "passes": attribution.record["window_passes"],
        "seconds": attribution.record["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="64,96,128,160,192")
    parser.add_argument("--window", type=int, default=48)
    parser.add_argument("--steps", default="2,4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "SIZE", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, size, steps = args.one
        print(json.dumps(measure(method, int(size), args.window, int(steps), args.threads)))
        return
    runs = [("Saliency", 0), *(("IntegratedGradients", int(s)) for s in args.steps.split(","))]
    sizes = [int(s) for s in args.sizes.split(",")]
    print(f"{args.window}³ windows, batch 2, float32; MB above the loaded process")
    print(f"{'method':24} {'size':>5} {'windows':>8} {'passes':>7} {'seconds':>8} {'peak MB':>9} {'volume MB':>10}")
    for method, steps in runs:
        peaks = []
        for size in sizes:
            command = [sys.executable, __file__, "--window", str(args.window), "--threads", str(args.threads)]
            command += ["--one", method, str(size), str(max(steps, 1))]
            result = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout
            )
            peaks.append(result["peak"])
            name = method + (f" n_steps={steps}" if steps else "")
            volume = size**3 * 4
            print(
                f"{name:24} {size:5d} {result['windows']:8d} {result['passes']:7d} {result['seconds']:8.1f} "
                f"{result['peak'] / 1e6:9.1f} {volume / 1e6:10.1f}",
                flush=True,
            )
        slope, intercept = np.polyfit([s**3 * 4 for s in sizes], peaks, 1)
        print(f"{name:24} peak = {intercept / 1e6:.0f} MB (windows) + {slope:.1f} float32 volumes\n", flush=True)


if __name__ == "__main__":
    main()
