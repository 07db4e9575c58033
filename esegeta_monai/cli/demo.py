"""``esegeta-monai demo``: one head, two networks; the maps show which of them uses a shortcut.

Both networks of the bundle brain_lesion_classification call the head a lesion. It has a planted lesion and, in a corner
of the image, a mark. One network was trained on heads without such marks. The other was trained on heads with the mark
exactly if there is a lesion, and has learned the mark.
"""

from __future__ import annotations

import importlib
import json
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import NDArray

import esegeta_monai
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.cases import ScanCase
from esegeta_monai.cli.explain import explain_cases
from esegeta_monai.cli.log import RunLog
from esegeta_monai.cli.trust import require_trust
from esegeta_monai.cli.values import choose_device
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import METHODS
from esegeta_monai.output.report.page import write_report
from esegeta_monai.targets.classes import ClassScore
from esegeta_monai.utils.files import INTENDED_USE, writable_folder

__all__ = ["DEMO_METHODS", "NETWORKS", "find_bundle", "make_head", "run", "template_scripts"]

BUNDLE = Path("bundles") / "brain_lesion_classification"
CASE = "head"
SPACING_MM = 4.0
SEED = 5_000_004  # unseen in training; a clear case, which both networks call a lesion
NETWORKS = {"lesion": "model.pt", "shortcut": "model_shortcut.pt"}
"""The networks by the object that they use, with their weights."""

# One method per mechanism; all together take seconds.
DEMO_METHODS = (
    "ExcitationBackprop",
    "DeepLift",
    "GuidedBackprop",
    "Saliency",
    "SmoothGrad(n_samples=8)",
    "GradCam",
    "Occlusion(window=8)",
)


def run(args: Namespace, log: RunLog) -> int:
    """Explain one head by two networks; print what share of each map is on the lesion and on the mark."""
    began = time.monotonic()
    output = Path(args.output)
    args.bundle = args.bundle or find_bundle()
    require_trust(args)
    methods = METHODS.create_all(",".join(args.methods or DEMO_METHODS))
    _say("Does a network look at the lesion, or at a mark in the corner of the image? One head, two networks,")
    _say(f"{len(methods)} methods: about a minute on two cores, 1 GB of memory, 10 MB in {output}.")
    writable_folder(output)
    device = choose_device(args.device)
    readers = {name: _reader(args.bundle, file, device) for name, file in NETWORKS.items()}
    for reader in readers.values():
        _ = reader.network  # report missing weights before any work
    _say("\n[1/3] Painting a head from the MNI152 template, a population average of skull-stripped brains ...")
    scan, objects = make_head(readers["lesion"], output)
    shares: dict[str, dict[str, list[float] | str]] = {}
    code = 0
    for number, (name, reader) in enumerate(readers.items(), 2):
        _say(f"[{number}/3] Explaining the network that was trained on {_TRAINED[name]} ...")
        target = ClassScore("lesion")
        writer = explain_cases(reader, [ScanCase(CASE, (scan,))], methods, [target], output / name, args, log)
        entries = json.loads(writer.run.path.read_text(encoding="utf-8"))["results"]
        shares[name] = {entry["method"] or "-": _shares(entry, output / name, objects) for entry in entries}
        code = max(code, writer.run.exit_code)
    _print_table(shares, objects)
    pages = [write_report(output / name).cases[CASE].resolve() for name in NETWORKS]
    _say(f"\n{time.monotonic() - began:.0f} s. {INTENDED_USE}")
    _say("Open the reports in a browser (no network connection needed):")
    for page in pages:
        _say(str(page))
    return code


_TRAINED = {"lesion": "lesions alone", "shortcut": "lesions that always came with the mark"}


def _say(text: str) -> None:
    print(text, flush=True)  # in order with the log, also without a terminal


def _reader(bundle: str | Path, weights: str, device: torch.device) -> BundleReader:
    """Open the bundle with other weights, and without resampling: the head is painted on the network's grid."""
    keys = {"keys": "@image_key"}
    read = [{"_target_": name, **keys} for name in ("LoadImaged", "EnsureChannelFirstd", "EnsureTyped")]
    path = str(Path(bundle).resolve() / "models" / weights)
    return BundleReader(
        bundle, overrides={"handlers#0#load_path": path, "preprocessing#transforms": read}, device=device
    )


def find_bundle(bundle: Path = BUNDLE) -> Path:
    """Return a bundle of this project: in the package (wheel), beside it (checkout), else in the working directory.

    Args:
        bundle: its path in a checkout.

    Raises:
        UsageError: it is in none of them.
    """
    package = Path(esegeta_monai.__file__).resolve().parent
    for root in (package, package.parent, Path.cwd()):
        if (root / bundle / "configs").is_dir():
            return root / bundle
    raise UsageError(
        f"the installed package does not include {bundle.as_posix()}: install it again, or give the folder in a "
        "checkout of the project by --bundle DIR"
    )


@contextmanager
def template_scripts(reader: BundleReader) -> Iterator[None]:
    """Let the scripts of a bundle that read or paint the template be imported.

    Raises:
        UsageError: nilearn, which has the template, or a script is missing.
    """
    try:
        with reader.importable():
            yield
    except ImportError as error:
        if error.name == "nilearn":
            raise UsageError('the template comes with nilearn: pip install "esegeta-monai[demo]"') from error
        raise UsageError(f"{reader.bundle_dir} has not all scripts of the template: {error}") from error


def make_head(reader: BundleReader, output: Path) -> tuple[Path, dict[str, NDArray[np.bool_]]]:
    """Write the head of the demo to ``output/head.nii.gz``; the bundle's own scripts paint it.

    Returns:
        The file, and the masks of the planted objects (spatial, bool) by name: ``lesion``, ``mark``.

    Raises:
        UsageError: nilearn, which has the template, or the scripts are missing.
    """
    with template_scripts(reader):
        anatomy: Any = importlib.import_module("scripts.anatomy")
        lesions: Any = importlib.import_module("scripts.lesions")
        case = lesions.LesionCases(anatomy.template_case(output / "mni152"), [SEED], shortcut=1.0)[0]
    file = output / f"{CASE}.nii.gz"
    # The head was turned and bent when it was painted: its axes are those of the network's grid, not of its old affine.
    nib.save(nib.Nifti1Image(case["image"][0].numpy(), np.diag((SPACING_MM, SPACING_MM, SPACING_MM, 1.0))), file)
    return file, {name: case[key][0].numpy() > 0 for name, key in (("lesion", "lesion"), ("mark", "shortcut"))}


def _shares(entry: Mapping[str, Any], output: Path, objects: Mapping[str, NDArray[np.bool_]]) -> list[float] | str:
    """Return the share of the map's positive part on each object, or why there is none."""
    if not entry.get("map"):
        return str(entry.get("reason") or entry["status"])
    values = nib.Nifti1Image.from_filename(output / entry["map"]).get_fdata().clip(0)
    total = float(values.sum())
    return [float(values[mask].sum()) / total if total > 0 else 0.0 for mask in objects.values()]


def _print_table(
    shares: Mapping[str, Mapping[str, list[float] | str]], objects: Mapping[str, NDArray[np.bool_]]
) -> None:
    names = list(dict.fromkeys(method for of in shares.values() for method in of))
    width = max(map(len, [*names, "share of the image"])) + 2
    columns = [f"{name:>10}" for name in objects]
    _say("\nWhat share of each map's positive part is on the planted lesion, and on the mark?")
    _say(" " * width + "".join(f"{f'network: {name}':>{10 * len(objects)}}   " for name in shares).rstrip())
    _say(" " * width + "   ".join("".join(columns) for _ in shares))
    volume = [float(mask.mean()) for mask in objects.values()]
    rows = [("share of the image", [volume] * len(shares))]
    rows += [(name, [of.get(name, "-") for of in shares.values()]) for name in names]  # type: ignore[misc]
    for name, cells in rows:
        _say(name.ljust(width) + "   ".join(_cell(cell, 10 * len(objects)) for cell in cells).rstrip())


def _cell(cell: list[float] | str, width: int) -> str:
    return f"{cell:>{width}}" if isinstance(cell, str) else "".join(f"{100 * share:8.1f} %" for share in cell)
