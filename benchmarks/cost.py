"""Measure minutes and GB of every method on a stated volume: the brain tissue bundle on the template, one target.

    python benchmarks/cost.py [--methods "A;B"] [--limit 120] [--again] [--work DIR] [--output FILE.md]

Each method has its default parameters and runs in its own process with one thread. First it runs briefly, as in
``--dry-run``. If the whole would take longer than `--limit` seconds, the row has this estimate, marked ≈. Otherwise the
row has the estimate and the measured time, which shows the accuracy of a dry run. Long methods of other kinds follow
with fewer steps or samples (`SMALL`) and always run to their end. Finished rows are kept in `--work`, so that an
interrupted run continues. Time is CPU time of one thread (also in the dry run), so that other work on the machine does
not count. Memory is the peak above that of the process after reading the network and the scan.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

BUNDLE = Path(__file__).parents[1] / "bundles" / "brain_tissue_segmentation"
CASES = ("FeaturePermutation", "PatternAttribution", "PatternNet")  # these need other cases: the scan itself, mirrored
SMALL = (
    "IntegratedGradients(n_steps=6)",
    "Occlusion(window=40)",
    "Lime(n_samples=10)",
    "ScoreCam(max_channels=6)",
    "AblationCam(max_channels=6)",
    "XRAI(n_steps=2)",
)
SKIPPED = {
    "Cam": "needs a network that ends in global pooling and one linear layer",
    "ChannelShapley": "the template has one channel",
}


def one(spec: str, limit: float) -> dict[str, Any]:
    """Measure one row, in its own process."""
    from unittest import mock

    import torch
    from monai.data import MetaTensor

    from esegeta_monai import Explainer
    from esegeta_monai.bundle.reader import BundleReader
    from esegeta_monai.explain.record import peak_memory, reset_peak_memory
    from esegeta_monai.methods.base import METHODS
    from esegeta_monai.targets import MultiClassMask

    torch.set_num_threads(1)
    reader = BundleReader(BUNDLE, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, reader.importable():
        file = importlib.import_module("scripts.anatomy").template_case(folder)["image"]
        image = reader.resolve("preprocessing")({"image": str(file)})["image"]
    assert isinstance(image, MetaTensor)
    cases = {"cases": [image.as_tensor().flip(axis) for axis in (1, 2)]}
    method = METHODS.get(spec)(**cases) if spec in CASES else METHODS.create(spec)
    explainer = Explainer(reader.network, reader.inferer, on_error="record")
    target = MultiClassMask(1)
    row: dict[str, Any] = {"method": spec, "shape": list(image.shape[1:]), "network": type(reader.network).__name__}
    row["window"] = list(getattr(reader.inferer, "roi_size", []))
    with torch.no_grad():
        prediction = reader.inferer(image[None], reader.network)
    reset_peak_memory(explainer.settings.device)
    before = peak_memory(explainer.settings.device)  # resident memory now
    start = time.process_time()
    with mock.patch("esegeta_monai.explain.costs._now", cpu_time):
        (cost,) = explainer.costs(image[None], [method], [target], prediction=prediction, calibration=4.0)
    if cost.note is not None:
        return {**row, "note": cost.note}
    estimate = cost.seconds
    assert estimate is not None
    row["dry_run"] = time.process_time() - start
    row |= {"passes": cost.passes, "exact": cost.exact, "estimate": estimate, "estimated": True}
    row |= {"seconds": estimate, "peak": (cost.peak_memory_bytes or 0) - before}
    if estimate <= limit or spec in SMALL:
        start = time.process_time()
        (attribution,) = explainer(image[None], [method], [target], prediction=prediction)
        seconds = time.process_time() - start
        row |= {"seconds": seconds, "estimated": False, "status": attribution.status}
        row |= {"passes": attribution.record["window_passes"], "reason": attribution.record.get("reason")}
        row |= {"foretold": cost.passes, "peak": attribution.record["peak_memory_bytes"] - before}
    return row


def cpu_time(device: Any) -> float:
    return time.process_time()


def table(rows: list[dict[str, Any]]) -> str:
    measured = [r for r in rows if "passes" in r]
    run = [r for r in measured if not r["estimated"]]
    ratios = [r["estimate"] / r["seconds"] for r in run]
    known = [r for r in measured if r["exact"] and not r["estimated"]]
    shape, window = ("x".join(map(str, measured[0][k])) for k in ("shape", "window"))
    right = sum(r["foretold"] == r["passes"] for r in known)
    lines = [
        "# Minutes and GB of methods",
        "",
        f"`python benchmarks/cost.py`: {measured[0]['network']} of the brain tissue bundle on the MNI152 template,",
        f"{shape}, in windows of {window}, one target (grey matter), float32, one thread of an x86-64 core. Minutes",
        "are CPU time of the explanation without the prediction; GB is the peak above the process with network, scan",
        "and prediction. ≈: from a dry run. Several gradient and CAM methods in one run share their passes and",
        "cost little more than the costliest one. For other volumes use `esegeta-monai explain --dry-run`",
        "on your machine.",
        "",
        "*Estimate* is the result of a dry run: known passes times a measured time per pass (four seconds of the",
        f"method, then a cheap copy of it on few windows). Of the {len(run)} methods that ran to their end, estimated",
        "over measured time is between",
        f"{min(ratios):.2f} and {max(ratios):.2f}, within a factor of two for {sum(0.5 <= r <= 2 for r in ratios)}; of",
        f"the {len(known)} whose passes are known in advance, {right} had the estimated number. A dry run takes",
        f"{min(r['dry_run'] for r in measured):.0f} to {max(r['dry_run'] for r in measured):.0f} s.",
        "",
        *_lines([r for r in rows if r["method"] not in SMALL]),
        "",
        "Long methods with fewer steps or samples, run to their end:",
        "",
        *_lines([r for r in rows if r["method"] in SMALL]),
    ]
    return "\n".join(lines) + "\n"


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| method | window passes | minutes | estimate | GB |", "|---|---|---|---|---|"]
    for r in sorted((r for r in rows if "passes" in r), key=lambda r: r["seconds"]):
        passes = f"{r['passes']:,}" if r["exact"] or not r["estimated"] else f"≈ {r['passes']:,}"
        took = f"≈ {minutes(r['seconds'])}" if r["estimated"] else minutes(r["seconds"])
        foretold = "" if r["estimated"] else minutes(r["estimate"])
        state = "" if r["estimated"] or r["status"] == "ok" else f" ({r['status']}: {r['reason']})"
        lines.append(f"| `{r['method']}`{state} | {passes} | {took} | {foretold} | {r['peak'] / 1e9:.2f} |")
    return lines + [f"| `{r['method']}` | {r['note']} | | | |" for r in rows if "note" in r]


def minutes(seconds: float) -> str:
    value = seconds / 60
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds; longer methods are estimated")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "esegeta_cost")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "cost.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.limit)))
        return
    from esegeta_monai.methods.base import METHODS

    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in options.methods.split(";") if options.methods else [*(c.__name__ for c in METHODS), *SMALL]:
        kept = options.work / f"{name}.json"
        if options.again or not kept.is_file():
            if name in SKIPPED:
                row = {"method": name, "note": SKIPPED[name]}
            else:
                words = [sys.executable, __file__, "--one", name, "--limit", str(options.limit)]
                done = subprocess.run(
                    words,
                    capture_output=True,
                    text=True,
                    encoding="utf-8",
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    check=False,
                )
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                row = json.loads(done.stdout.splitlines()[-1])
            kept.write_text(json.dumps(row), encoding="utf-8")
            print(name, {k: row[k] for k in ("passes", "seconds", "peak", "note", "estimated") if k in row}, flush=True)
        rows.append(json.loads(kept.read_text(encoding="utf-8")))
    options.output.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
