"""Explain every bundle of a Model Zoo checkout, unedited, and write the page docs/zoo.md.

    python benchmarks/zoo.py CHECKOUT --work DIR [--only NAME ...] [--again] [--python PYTHON] [--table docs/zoo.md]

CHECKOUT is a folder of bundles (the model zoo's `models/`). For each bundle, in DIR/NAME:

1. copy the bundle; if its checkpoint is missing, write random weights (seed 0) in its place;
2. write a small synthetic input in the expected layout (`zoo_inputs.py`);
3. write the overlay with `esegeta-monai overlay --bundle`; on the input (or a crop of it), compare the gradient of
   `Explainer` with PyTorch's autograd through the bundle's own inferer (`zoo_check.py`, which also chooses a class that
   these weights predict);
4. run `python -m monai.bundle run` without and with the overlay, and compare the predictions byte by byte.

A bundle passes ("green") if a map has status ok, its target has voxels, it is not zero, it is on the input's grid, the
gradient is that of full autograd (<= 1e-5 of its largest value), and the predictions are equal. Finished bundles are
skipped; `--again` repeats them. The checkout is only read.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from zoo_inputs import RECIPES, Recipe

TOLERANCE = 1e-5
MEMORY = 18 << 30
HERE = Path(__file__).resolve().parent


def modest() -> None:
    """Limit a command to 18 GB of address space, so that only this command fails."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def available() -> float:
    """Return the free memory in GB."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def call(python: str, *words: str, cwd: Path, log: Path, limit: float, gigabytes: float) -> tuple[int, float]:
    """Run a command with its output in `log`; return exit code and CPU seconds."""
    while available() < gigabytes:
        time.sleep(10)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {
        **os.environ,
        "ESEGETA_TRUST": "1",  # this program runs the code of the whole Model Zoo
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parent),
        "TORCH_HOME": str(log.parent.parent / "torch_home"),
    }
    with log.open("w", encoding="utf-8") as stream:
        stream.write("$ " + " ".join(words) + "\n")
        stream.flush()
        try:
            code = subprocess.run(
                [python, *words],
                cwd=cwd,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env=environment,
                preexec_fn=modest,
            ).returncode
            stream.write(f"exit code {code}\n")
        except subprocess.TimeoutExpired:
            code = 124
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return code, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def last_line(log: Path) -> str:
    """Return the line of a log that states the error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "Warning" not in line and not line.startswith("File")]
    text = (errors or lines or ["no output"])[-1]
    return text.replace(str(log.parent.resolve()), "WORK")[:300]


def as_options(values: dict[str, Any]) -> list[str]:
    """Return ids and values in the form of MONAI's command line."""
    words = []
    for key, value in values.items():
        words += [f"--{key}", value if isinstance(value, str) else repr(value)]
    return words


def explain_bundle(source: Path, work: Path, recipe: Recipe, python: str, limit: float) -> dict[str, Any]:
    """Run one bundle and return its row of the table."""
    row: dict[str, Any] = {"bundle": source.name, "needs": recipe.needs_why, "speed": recipe.speed_why}
    row["options"] = recipe.options
    if recipe.cause:
        return {**row, "green": False, "cause": recipe.cause}
    shutil.rmtree(work, ignore_errors=True)
    bundle, data = work / "bundle", work / "data"
    shutil.copytree(source, bundle)
    data.mkdir()
    config = next(p for p in sorted((bundle / "configs").glob("inference.*")) if p.suffix in (".json", ".yaml", ".yml"))
    own = {**recipe.data(data), **recipe.needs, **recipe.speed}
    job = {
        "bundle": str(bundle),
        "config": str(config),
        "overrides": own,
        "crop": recipe.crop,
        "options": recipe.options,
    }
    changes = {**recipe.needs, **recipe.speed}
    job["overlay"] = ["overlay", "--bundle", str(bundle), "--output", str(work / "explain.json")]
    for key, value in changes.items():
        job["overlay"] += ["--override", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
    code, seconds = call(
        python,
        str(HERE / "zoo_check.py"),
        str(work / "job.json"),
        cwd=bundle,
        log=work / "check.log",
        limit=limit,
        gigabytes=recipe.gigabytes,
    )
    row["found"] = [
        x.strip() for x in (work / "check.log").read_text(encoding="utf-8").splitlines() if x.startswith("  ")
    ][:10]
    row["check_cpu_seconds"] = round(seconds, 1)
    if not (work / "check.json").is_file():
        return {**row, "green": False, "cause": last_line(work / "check.log")}
    check = json.loads((work / "check.json").read_text(encoding="utf-8"))
    row.update(check)
    common = ["--bundle_root", str(bundle), *as_options(own)]
    run = ["-m", "monai.bundle", "run"] + ([] if check["run_id"] == "run" else [check["run_id"]])
    outputs = {}
    for kind in ("plain", "explained"):
        outputs[kind] = work / kind
        files = [str(config)] + ([str(work / "explain.json")] if kind == "explained" else [])
        words = [*run, "--config_file", repr(files), *common, "--output_dir", str(outputs[kind])]
        if kind == "explained":
            words += ["--explain_methods", recipe.methods, "--explain_targets", check["target"]]
            words += ["--explain_output_dir", str(work / "maps"), *as_options(recipe.options)]
            words += ["--explain_handler#pictures", "false"]
        code, seconds = call(
            python, *words, cwd=bundle, log=work / f"{kind}.log", limit=limit, gigabytes=recipe.gigabytes
        )
        row[f"{kind}_cpu_seconds"] = round(seconds, 1)
        if code:
            return {**row, "green": False, "cause": f"{kind}: {last_line(work / f'{kind}.log')}"}
    row["predictions"], row["predictions_equal"] = equal_predictions(outputs["plain"], outputs["explained"])
    row["maps"] = maps = [look_at(sidecar, data) for sidecar in sorted((work / "maps").rglob("*_attr.json"))]
    causes = []
    if not maps:
        run_json = work / "maps" / "run.json"
        results = json.loads(run_json.read_text(encoding="utf-8"))["results"] if run_json.is_file() else []
        causes.append("; ".join(sorted({f"{r['status']}: {r['reason']}" for r in results})) or "no case was explained")
    for one in maps:
        causes += [f"{one['name']}: {what}" for what in one["wrong"]]
    if row["predictions_equal"] is not True:
        causes.append(f"predictions differ: {row['predictions_equal']}")
    if row["deviation"] is None or row["deviation"] > TOLERANCE:
        causes.append(f"the gradient deviates from full autograd by {row['deviation']}")
    return {**row, "green": not causes, "cause": "; ".join(causes)}


def look_at(sidecar: Path, data: Path) -> dict[str, Any]:
    """Describe a written map and its errors."""
    record = json.loads(sidecar.read_text(encoding="utf-8"))
    wrong = [] if record["status"] == "ok" else [f"status {record['status']}: {record.get('reason')}"]
    if not record.get("target_voxels"):
        wrong.append("the target has no voxels")
    row: dict[str, Any] = {"name": sidecar.stem, "status": record["status"], "wrong": wrong}
    row.update({k: record.get(k) for k in ("target", "target_voxels", "blend_deviation", "windows_used")})
    file = sidecar.with_name(sidecar.name.replace("_attr.json", "_attr.nii.gz"))
    file = file if file.is_file() else file.with_name(file.name.removesuffix(".gz"))
    if not file.is_file():
        wrong.append("no map")
        return row
    image = nib.load(file)
    values = np.asarray(image.dataobj)
    row.update(shape=list(values.shape), largest=float(np.abs(values).max()))
    if not np.any(values):
        wrong.append("the map is zero")
    scans = [p for p in data.rglob("*") if p.name.startswith(record["case"].split("-")[-1] + ".")]
    scans = [p for p in scans if p.name.endswith((".nii.gz", ".nii", ".png", ".jpg", ".jpeg", ".tif"))]
    grids = [grid_of(p) for p in scans]
    if grids and not any(
        values.shape[: len(shape)] == shape and (affine is None or np.allclose(image.affine, affine, atol=1e-4))
        for shape, affine in grids
    ):
        wrong.append(f"its grid {values.shape} is not the input's {grids[0][0]}")
    row["grid_compared"] = bool(grids)
    return row


def grid_of(file: Path) -> tuple[tuple[int, ...], np.ndarray | None]:
    """Return shape (without channels) and affine of an input; for pictures (width, height), as MONAI reads them."""
    if ".nii" in file.name:
        image = nib.load(file)
        return image.shape[:3], image.affine
    from PIL import Image

    return Image.open(file).size, None


def equal_predictions(plain: Path, explained: Path) -> tuple[int, Any]:
    """Compare the files of two runs; return their number, and True or the difference.

    NIfTI files are compared by header, affine and voxels, others by every byte.
    """
    files = sorted(p.relative_to(plain) for p in plain.rglob("*") if p.is_file())
    others = sorted(p.relative_to(explained) for p in explained.rglob("*") if p.is_file())
    if files != others:
        return len(files), f"files {sorted(map(str, set(files) ^ set(others)))[:4]}"
    for name in files:
        if ".nii" in name.name:
            a, b = nib.load(plain / name), nib.load(explained / name)
            same = a.header.binaryblock == b.header.binaryblock and np.array_equal(
                np.asarray(a.dataobj), np.asarray(b.dataobj), equal_nan=True
            )
        else:
            same = (plain / name).read_bytes() == (explained / name).read_bytes()
        if not same:
            return len(files), str(name)
    return len(files), True


def table(rows: list[dict[str, Any]], commit: str) -> str:
    """Return the text of docs/zoo.md."""
    green = [r for r in rows if r["green"]]
    nothing = [r for r in green if not r["needs"] and not r["speed"] and not r["options"]]
    lines = [
        "# The Model Zoo, bundle by bundle",
        "",
        f"Every bundle of [Project-MONAI/model-zoo](https://github.com/Project-MONAI/model-zoo){commit} was run,",
        "unedited, by `python -m monai.bundle run` with the overlay that `esegeta-monai overlay --bundle DIR`",
        "writes. If a checkpoint is missing, the weights are random: such a map shows that the software works, not",
        "what a model has learned.",
        "",
        f"**{len(green)} of {len(rows)} pass, {len(nothing)} of them without any change** except the settings for",
        "data, output and target. A bundle passes if the status is ok, the target has voxels, the map is not zero",
        "and has the input's grid, the gradient equals full autograd through the bundle's own inferer",
        f"(<= {TOLERANCE:g} of its largest value), and the files that the bundle writes are equal with and without the",
        "overlay (NIfTI: header and voxels; others: every byte).",
        "",
        "This command writes the page. It skips finished bundles, and several instances can run at the same time:",
        "",
        "    python benchmarks/zoo.py CHECKOUT/models --work DIR --table docs/zoo.md",
        "",
        "| bundle | network | inferer | changes | target | maps | off autograd | predictions | CPU s, with maps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        done = [f"needs: {row['needs']}"] if row["needs"] else []
        done += [f"for speed: {row['speed']}"] if row["speed"] else []
        done += [f"option {k}" for k in row["options"]]
        name = row["bundle"] if row["green"] else f"{row['bundle']} (fails)"
        if "deviation" not in row:
            lines.append(f"| {name} | | | {'; '.join(done) or 'none'} | | | | | |")
            continue
        predictions = "none written" if not row.get("predictions") else f"{row['predictions']} equal"
        if row.get("predictions_equal") is not True:
            predictions = "-"
        seconds = f"{row.get('plain_cpu_seconds', '-')}, {row.get('explained_cpu_seconds', '-')}"
        deviation = "-" if row["deviation"] is None else f"{row['deviation']:.1e}"
        lines.append(
            f"| {name} | {row['network']} | {row['inferer']} | {'; '.join(done) or 'none'} | `{row['target']}` | "
            f"{len(row.get('maps', []))} | {deviation} | {predictions} | {seconds} |"
        )
    lines += ["", "## Why the others fail", ""]
    lines += [f"* **{r['bundle']}**: {why(r)}" for r in rows if not r["green"]] or ["None."]
    return "\n".join(lines) + "\n" + FOOT


def why(row: dict[str, Any]) -> str:
    """Return the known reason of a failure, or the last line of the output."""
    recipe = RECIPES.get(row["bundle"])
    return recipe.why if recipe is not None and recipe.why else row["cause"]


FOOT = """
Notes: BraTS and VISTA3D ran with their own windows. BraTS was explained with `Occlusion`, and its gradient was compared
on a crop with windows of 64x64x48. `spleen_deepedit_annotation` was compared on a crop of 64x64x64.

Environment: the pinned versions with torchvision 0.28, timm, einops and fire, and NumPy 1.26, because the script of
`valve_landmarks` uses `numpy.product`, which NumPy 2 removed. `breast_density_classification` downloads pretrained
weights; they were replaced by random ones in torch's cache. All inputs are synthetic.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the requirements of the bundles")
    parser.add_argument("--limit", type=float, default=1800, help="time limit per command, in seconds")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--commit", default="", help="commit of the checkout, for the table")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    names = [p.name for p in sorted(options.checkout.iterdir()) if (p / "configs").is_dir()]
    for name in options.only or names:
        result = work / name / "row.json"
        if result.is_file() and not options.again:
            continue
        started = time.monotonic()
        claim = work / f"{name}.claim"
        try:
            claim.touch(exist_ok=False)  # several instances may run at the same time
        except FileExistsError:
            continue
        recipe = RECIPES.get(name, Recipe(cause="no recipe for its input"))
        row = explain_bundle(
            options.checkout.resolve() / name, work / name, recipe, os.path.abspath(options.python), options.limit
        )
        (work / name).mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps(row, indent=1), encoding="utf-8")
        claim.unlink()
        verdict = "passes" if row["green"] else f"FAILS: {row['cause'][:400]}"
        print(f"{name}: {verdict} ({time.monotonic() - started:.0f} s)", flush=True)
    rows = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(work.glob("*/row.json"))]
    print(f"{sum(r['green'] for r in rows)} of {len(rows)} pass")
    if options.table:
        options.table.write_text(table(rows, f" at {options.commit}" if options.commit else ""), encoding="utf-8")
    return 0 if all(r["green"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
