"""Time from a click on a voxel to its map in the app, beside the bare passes of the network through its windows.

The network is resident, the case is loaded, and the map is InputXGradient's. Bare passes: one forward and one backward
pass for each window that holds the voxel, without anything else.

    python -m benchmarks.app_click [--repeat 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from esegeta_monai.app.view import Views
from esegeta_monai.cli.app import BUNDLE, template
from esegeta_monai.cli.app_jobs import Resident
from esegeta_monai.cli.demo import find_bundle
from esegeta_monai.cli.main import build_parser


def timed(work: Callable[[int], object], repeat: int) -> tuple[float, float]:
    """Return the medians of wall and processor seconds, after one call that is not counted."""
    walls, processor = [], []
    for i in range(repeat + 1):
        began, cpu = time.monotonic(), time.process_time()
        work(i)
        walls.append(time.monotonic() - began)
        processor.append(time.process_time() - cpu)
    return statistics.median(walls[1:]), statistics.median(processor[1:])


def synthetic(path: Path, side: int = 128) -> Path:
    """Write a bright ball with noise, 2 mm voxels."""
    axes = np.meshgrid(*[np.linspace(-1, 1, side)] * 3, indexing="ij")
    noise = np.random.default_rng(0).normal(0, 0.05, (side,) * 3)
    ball = np.exp(-3 * sum(a**2 for a in axes)) + noise
    nib.save(nib.Nifti1Image((100 * ball).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


def measure(resident: Resident, case: int, repeat: int) -> str:
    loaded = resident.load({"case": case})
    kept = resident.case(case)
    shape = kept.prepared.image.shape[1:]
    affine = np.asarray(kept.prepared.image.affine, dtype=float)
    middle = (affine @ [*(n // 2 for n in shape), 1.0])[:3].round(1)

    def explain(i: int) -> None:
        world = [float(v) + shift for v, shift in zip(middle, (2.0 * i, 0.0, 0.0))]
        target = f"Voxel(class_index=1, world={world}, name='Voxel-{i}')"
        result = resident.explain({"case": case, "target": target, "methods": ["InputXGradient"]})
        assert [entry["status"] for entry in result["results"]] == ["ok"], result["results"]

    objective = kept.predicted.objective([])
    place = [int(v) for v in np.rint(np.linalg.solve(affine, [*middle, 1.0])[:3])]
    box = tuple(slice(p, p + 1) for p in place)
    windows = objective.grid.windows_of(box, torch.ones(1, 1, 1, dtype=torch.bool))
    batch = objective.window_batch

    def bare(_: int) -> None:
        for i in range(0, len(windows), batch):
            x = torch.cat([objective.window(w) for w in windows[i : i + batch]]).requires_grad_()
            out = resident.network(x)
            torch.autograd.grad(out[:, 1].sum(), x)

    views = Views(resident.output)
    resident.network.eval().requires_grad_(False)
    passes, job = timed(bare, repeat), timed(explain, repeat)
    view = timed(lambda _: views.make(resident.cases[case].name, loaded, None), repeat)
    ratio = (job[1] + view[1]) / passes[1]
    lines = [
        f"{resident.cases[case].name} {tuple(shape)}: {len(windows)} of {loaded['windows']} windows hold the voxel",
        *(
            f"  {name:<28} {wall:7.2f} s  processor {cpu:7.2f} s"
            for name, (wall, cpu) in (("bare passes", passes), ("job: map, picture, record", job), ("view", view))
        ),
        f"  job / bare {job[1] / passes[1]:.2f}, click to map / bare {ratio:.2f} (processor time)",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [
            "app",
            "--bundle",
            str(find_bundle(BUNDLE)),
            "--device",
            "cpu",
            "--output",
            str(folder / "out"),
            "--input",
        ]
        arguments = build_parser().parse_args([*words, str(synthetic(folder / "cube128.nii.gz"))])
        resident = Resident(vars(arguments), name)
        scan = template(resident.reader, folder)
        for file in (scan, folder / "cube128.nii.gz"):
            arguments = build_parser().parse_args([*words, str(file)])
            print(measure(Resident(vars(arguments), name), 0, options.repeat), flush=True)


if __name__ == "__main__":
    main()
