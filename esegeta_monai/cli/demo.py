"""``esegeta-monai demo``: explain the brain tissue bundle on the MNI152 template by one method per mechanism."""

from __future__ import annotations

import importlib
import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import esegeta_monai
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.cases import ScanCase
from esegeta_monai.cli.explain import explain_cases
from esegeta_monai.cli.log import RunLog
from esegeta_monai.cli.trust import require_trust
from esegeta_monai.cli.values import choose_device
from esegeta_monai.errors import UsageError
from esegeta_monai.files.maps import sidecar_path
from esegeta_monai.methods.base import METHODS
from esegeta_monai.output.report.page import write_report
from esegeta_monai.utils.files import INTENDED_USE

__all__ = ["DEMO_METHODS", "find_bundle", "run", "template"]

BUNDLE = Path("bundles") / "brain_tissue_segmentation"
CASE = "mni152_t1_2mm"

# Fast enough for two cores: few samples, occluders that tile the head, and just enough steps for a completeness gap
# below the 5 % of the warning (measured on grey matter: 9 % with 8 steps, 2.5 % with 12).
DEMO_METHODS = (
    "Saliency",
    "InputXGradient",
    "IntegratedGradients(n_steps=12)",
    "SmoothGrad(n_samples=4)",
    "GuidedBackprop",
    "GradCam",
    "LayerActivation",
    "Occlusion(window=32)",
)


def run(args: Namespace, log: RunLog) -> int:
    """Explain the template; print a table of the results and the paths of the pictures and the report."""
    began = time.monotonic()
    output = Path(args.output)
    args.bundle = args.bundle or find_bundle()
    require_trust(args)
    reader = BundleReader(args.bundle, device=choose_device(args.device))
    methods = METHODS.create_all(",".join(args.methods or DEMO_METHODS))
    _ = reader.network  # report missing weights before creating the template
    print(f"{reader.name}, on the MNI152 template: a population average of skull-stripped brains, not a patient.")
    scan = template(reader, output)
    writer = explain_cases(reader, [ScanCase(CASE, (scan,))], methods, None, output, args, log)
    entries = json.loads(writer.run.path.read_text(encoding="utf-8"))["results"]
    _print_table([entry for entry in entries if entry["case"] == CASE], output)
    pictures = sorted(output.glob(f"{CASE}/*.png"))
    print(f"\n{len(pictures)} pictures, maps (.nii.gz) and records (.json) are in {output / CASE}")
    written = write_report(output)
    print(f"{time.monotonic() - began:.0f} s. {INTENDED_USE}")
    print(f"Open the report in a browser (no network connection needed): {written.cases[CASE].resolve()}")
    return writer.run.exit_code


def find_bundle() -> Path:
    """Return the demonstration bundle of this package's checkout, else of the working directory.

    Raises:
        UsageError: it is in neither; a wheel does not include it.
    """
    for root in (Path(esegeta_monai.__file__).resolve().parents[1], Path.cwd()):
        if (root / BUNDLE / "configs").is_dir():
            return root / BUNDLE
    raise UsageError(
        f"the installed package does not include {BUNDLE.as_posix()}: give the folder in a checkout of the project by "
        "--bundle DIR"
    )


def template(reader: BundleReader, output: Path) -> Path:
    """Return the file of the template; the bundle's own script creates it once."""
    try:
        with reader.importable():
            anatomy: Any = importlib.import_module("scripts.anatomy")
            return Path(anatomy.template_case(output / "mni152")["image"])
    except ImportError as error:
        if error.name == "nilearn":
            raise UsageError('the template comes with nilearn: pip install "esegeta-monai[demo]"') from error
        raise UsageError(f"{reader.bundle_dir} has no scripts/anatomy.py that creates the template: {error}") from error


def _print_table(entries: list[dict[str, Any]], output: Path) -> None:
    rows = [("target", "method", "status", "seconds", "completeness gap")]
    for entry in entries:
        gap, seconds = None, entry.get("seconds")
        if entry.get("map"):
            gap = json.loads(sidecar_path(output / entry["map"]).read_text(encoding="utf-8")).get("completeness_gap")
        rows.append(
            (
                entry["target"] or "-",
                entry["method"] or "-",
                entry["status"].replace("_", " "),
                "-" if seconds is None else f"{seconds:.1f}",
                "-" if gap is None else f"{100 * gap:.2g} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    for entry in entries:
        if entry["status"] in ("failed", "timeout"):
            print(f"{entry['target']}, {entry['method']}: {entry['reason']}")
