"""Minutes and GB of every method on a stated volume: the demo's bundle on the MNI152 template, one target.

    python benchmarks/cost.py [--methods A,B] [--limit 120] [--again] [--work DIR] [--output FILE.md]

Each method has its default parameters and a process of its own with one thread. It is run for a moment first, as
``--dry-run`` does; where the whole would take longer than `--limit` seconds, the estimate from that moment is the row,
marked ≈. Else the estimate stands beside what it took, so that one sees what a dry run is worth. Finished rows are kept
in `--work`, so that a stopped run goes on. Time is CPU time of one thread, so that other work on the machine does not
count; memory is the peak above that of the process that has read the network and the scan.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

CASES = ("FeaturePermutation", "PatternAttribution", "PatternNet")  # need others: the scan itself, mirrored
SKIPPED = {
    "Cam": "needs a network that ends in global pooling and one linear layer",
    "ChannelShapley": "the template has one channel",
}


def one(name: str, limit: float) -> dict[str, Any]:
    """One row, in a process of its own."""
    import torch
    from monai.data import MetaTensor

    from esegeta_monai import Explainer, methods
    from esegeta_monai.bundle.reader import BundleReader
    from esegeta_monai.commands.demo import find_bundle, template
    from esegeta_monai.record import peak_memory, reset_peak_memory
    from esegeta_monai.targets import MultiClassMask

    torch.set_num_threads(1)
    reader = BundleReader(find_bundle(), device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        file = template(reader, Path(folder))
        with reader.importable():
            image = reader.resolve("preprocessing")({"image": str(file)})["image"]
    assert isinstance(image, MetaTensor)
    cases = {"cases": [image.as_tensor().flip(axis) for axis in (1, 2)]} if name in CASES else {}
    method = getattr(methods, name)(**cases)
    explainer = Explainer(reader.network, reader.inferer, on_error="record")
    target = MultiClassMask(1)
    row: dict[str, Any] = {"method": name, "shape": list(image.shape[1:]), "network": type(reader.network).__name__}
    row["window"] = list(getattr(reader.inferer, "roi_size", []))
    with torch.no_grad():
        prediction = reader.inferer(image[None], reader.network)
    reset_peak_memory(explainer.device)
    before = peak_memory(explainer.device)  # what is resident now
    start, wall = time.process_time(), time.monotonic()
    (cost,) = explainer.costs(image[None], [method], [target], prediction=prediction, calibration=4.0)
    if cost.note is not None:
        return {**row, "note": cost.note}
    assert cost.seconds is not None
    # the estimate is wall time: brought to CPU time by the share of the core that the calibration had
    estimate = cost.seconds * (time.process_time() - start) / (time.monotonic() - wall)
    row |= {"passes": cost.passes, "exact": cost.exact, "estimate": estimate, "estimated": True}
    row |= {"seconds": estimate, "peak": (cost.peak_memory_bytes or 0) - before}
    if estimate <= limit:
        start = time.process_time()
        (found,) = explainer(image[None], [method], [target], prediction=prediction)
        seconds = time.process_time() - start
        row |= {"seconds": seconds, "estimated": False, "status": found.status}
        row |= {"passes": found.record["window_passes"], "reason": found.record.get("reason")}
        row |= {"foretold": cost.passes, "peak": found.record["peak_memory_bytes"] - before}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    measured = [r for r in rows if "passes" in r]
    run = [r for r in measured if not r["estimated"]]
    near = [r for r in run if 0.5 <= r["estimate"] / r["seconds"] <= 2]
    exact = [r for r in run if r["exact"]]
    shape, window = ("x".join(map(str, measured[0][k])) for k in ("shape", "window"))
    lines = [
        "# Minutes and GB of methods",
        "",
        f"`python benchmarks/cost.py`: {measured[0]['network']} of the demo's bundle on the MNI152 template, {shape},",
        f"in windows of {window}, one target (grey matter), the methods' default parameters, float32, one thread of an",
        "x86-64 core. Minutes are CPU time of the explanation, the prediction given; GB is the peak above the process",
        "with network, scan and prediction. ≈: from a moment's run and the passes. Several gradient and",
        "CAM methods asked for together share their passes and cost little more than the dearest of them. For other",
        "volumes `esegeta-monai explain --dry-run` says what your machine would need.",
        "",
        f"*Foretold* is what a dry run says, from four seconds of the method: within a factor of two for {len(near)} "
        f"of the {len(run)} methods that were run to their end, and the passes as foretold for "
        f"{sum(r['foretold'] == r['passes'] for r in exact)} of the {len(exact)} whose number is known before.",
        "",
        "| method | window passes | minutes | foretold | GB |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(measured, key=lambda r: r["seconds"]):
        about = "≈ " if r["estimated"] else ""
        passes = f"{r['passes']:,}" if r["exact"] or not r["estimated"] else f"≤ {r['passes']:,}"
        foretold = "" if r["estimated"] else minutes(r["estimate"])
        state = "" if r["estimated"] or r["status"] == "ok" else f" ({r['status']}: {r['reason']})"
        took = about + minutes(r["seconds"])
        lines.append(f"| `{r['method']}`{state} | {passes} | {took} | {foretold} | {r['peak'] / 1e9:.2f} |")
    lines += [f"| `{r['method']}` | {r['note']} | | | |" for r in rows if "note" in r]
    return "\n".join(lines) + "\n"


def minutes(seconds: float) -> str:
    value = seconds / 60
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds; what takes longer is estimated")
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
    for name in options.methods.split(",") if options.methods else [c.__name__ for c in METHODS]:
        kept = options.work / f"{name}.json"
        if options.again or not kept.is_file():
            if name in SKIPPED:
                row = {"method": name, "note": SKIPPED[name]}
            else:
                words = [sys.executable, __file__, "--one", name, "--limit", str(options.limit)]
                done = subprocess.run(
                    words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
                )
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                row = json.loads(done.stdout.splitlines()[-1])
            kept.write_text(json.dumps(row))
            print(name, {k: row[k] for k in ("passes", "seconds", "peak", "note", "estimated") if k in row}, flush=True)
        rows.append(json.loads(kept.read_text()))
    options.output.write_text(table(rows))


if __name__ == "__main__":
    main()
