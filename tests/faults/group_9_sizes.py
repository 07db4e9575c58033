"""A folder of many files, and a large volume."""

from __future__ import annotations

import resource
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from tests.faults.group_4_kills import full
from tests.faults.group_9_load import GROUP, Mark, steady, watched
from tests.faults.runner import TARGET, Row, command, start, statuses, unfinished
from tests.support.cli import config, make_bundle, make_scan

SMALL = 8


def _small_bundle(folder: Path) -> Path:
    """A network of one layer and a preprocessing that only reads, so that a case costs what the package adds."""
    bundle = make_bundle(
        folder / "bundle",
        weights=False,
        network_def={"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1},
        preprocessing={"_target_": "Compose", "transforms": config()["preprocessing"]["transforms"][:1]},
        inferer={"_target_": "SlidingWindowInferer", "roi_size": [SMALL] * 3, "sw_batch_size": 1, "overlap": 0.0},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torch.nn.Conv3d(1, 3, 1).state_dict(), bundle / "models" / "model.pt")
    return bundle


def _files(folder: Path) -> str:
    """Time per case, memory and open files of a folder of 2,000 scans must not grow from its begin to its end."""
    count = full(2000, 200)
    content = make_scan(folder / "one.nii.gz", (SMALL,) * 3).read_bytes()
    (folder / "in").mkdir()
    for i in range(count):
        (folder / "in" / f"case{i:04d}.nii.gz").write_bytes(content)
    output, marks = folder / "out", list[Mark]()
    words = ["explain", "--bundle", _small_bundle(folder), "--input", folder / "in", "--output", output, "--quiet"]
    words += ["--methods", "Saliency", "--target", "OutputValue(0)", "--no-pictures", "--no-checks"]
    running = start(*words, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)))
    watched(running, marks)
    done = running.wait(3600)
    assert done.code == 0, done.err[-500:]
    assert len(statuses(output)) == count
    assert set(statuses(output).values()) == {"ok"}
    assert not unfinished(output)
    ends = sorted(p.stat().st_mtime for p in output.glob("*/*_attr.json"))
    text = steady(marks, ends)
    begun = float(np.interp(ends[0], [m.at for m in marks], [m.cpu for m in marks]))
    assert begun <= 15, f"{begun:.1f} s of processor time before the first result"
    again = command(*words, timeout=3600)
    assert again.code == 0, again.err[-500:]
    assert set(statuses(output).values()) == {"skipped"}
    times = f"{done.cpu_seconds:.0f} s of processor time, again {again.cpu_seconds:.0f} s"
    return f"first result after {begun:.1f} s; {text}; {times}"


def _large(folder: Path) -> str:
    """240 x 240 x 155 voxels, 34 MB in float32: explained, reported and evaluated in at most 1.5 GB."""
    inferer = {"_target_": "SlidingWindowInferer", "roi_size": [64] * 3, "sw_batch_size": 1, "overlap": 0.0}
    bundle, shape = make_bundle(folder / "bundle", inferer=inferer), (240, 240, 155)
    scan = make_scan(folder / "big.nii.gz", shape)
    label = (nib.load(scan).get_fdata(dtype=np.float32) > 0.5).astype(np.uint8)
    nib.save(nib.Nifti1Image(label, nib.load(scan).affine), folder / "label.nii.gz")
    words = ["--bundle", bundle, "--input", scan]
    peaks = {}
    runs = {
        "explain": [*words, "--methods", "Saliency,GradCam", "--target", TARGET, "--output", folder / "out"],
        "report": [folder / "out"],
        "evaluate": [
            *(*words, "--maps", folder / "out", "--output", folder / "evaluated"),
            *("--metrics", "Sparseness,RelevanceMass", "--label", folder / "label.nii.gz"),
        ],
    }
    for name, more in runs.items():
        done = command(name, *more, timeout=1800)
        assert done.code == 0, (name, done.err[-500:])
        peaks[name] = done.memory >> 20
        assert peaks[name] <= 1500, peaks
    pages = [page.stat().st_size for page in (folder / "out").rglob("*.html")]
    assert max(pages) < 5e6
    return ", ".join(f"{name} {mb} MB" for name, mb in peaks.items()) + f"; page {max(pages) / 1e6:.1f} MB"


ROWS = [
    Row(GROUP, "2,000 files in one folder, and again", _files, long=True),
    Row(GROUP, "a volume of 240 x 240 x 155, its report and evaluation", _large, long=True),
]
