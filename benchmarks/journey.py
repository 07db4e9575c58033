"""Count the files and functions of the package that one explanation uses, from `Explainer` to a written NIfTI.

    PYTHONPATH=CHECKOUT python benchmarks/journey.py [--package esegeta_monai] [--list]

One Saliency and one Occlusion of a fixed volume run under `sys.setprofile`. The script counts calls of Python functions
defined by the package: *files* entered, *functions* (by file and name, including comprehensions and lambdas), and
*changes of file*: calls from a function in one file of the package to a function in another, and the returns. Calls of
other packages in between, such as torch, do not count. A warm-up run excludes imports and caches. The checks of
what maps take for granted are off.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

WRITERS = ("output.writer", "output", "writer")  # modules of the writer: the new ones, then the old one
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>", "<lambda>"}
"""Frames that belong to the function in which they are written."""

METHODS = {"Saliency": "Saliency", "Occlusion": "Occlusion(window=8)"}


class Journey:
    """Counter of the files and functions that a profiled call enters.

    Args:
        folder: folder of the package.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = f"{folder}/"
        self.stack: list[CodeType] = []
        self.functions: set[tuple[str, str]] = set()
        self.entered: Counter[str] = Counter()
        self.changes = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Hook of `sys.setprofile`; resuming a generator is a call, yielding is a return."""
        code = frame.f_code
        if code.co_name in COMPREHENSIONS:
            return
        if event not in ("call", "return") or not code.co_filename.startswith(self.folder):
            return
        if event == "call":
            self._change(code.co_filename)
            self.stack.append(code)
            self.functions.add((code.co_filename, code.co_qualname if sys.version_info >= (3, 11) else code.co_name))
            self.entered[code.co_filename] += 1
        elif self.stack:
            left = self.stack.pop()
            self._change(left.co_filename)

    def _change(self, file: str) -> None:
        self.changes += bool(self.stack) and self.stack[-1].co_filename != file

    def __str__(self) -> str:
        return f"{len(self.entered)} files, {len(self.functions)} functions, {self.changes} changes of file"


def writer_of(package: str) -> Any:
    """Find the class that writes results."""
    for module in WRITERS:
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(f"{package}.{module}").ResultWriter
    raise SystemExit(f"{package} has no ResultWriter in {', '.join(WRITERS)}")


def without_checks(made: Any) -> dict[str, bool]:
    """Return the option that switches the checks off; earlier checkouts have none."""
    return {"checks": False} if "checks" in inspect.signature(made).parameters else {}


def explain(package: str, text: str, folder: str) -> None:
    """Run one method for one class of a fixed volume, through overlapping windows, and write a NIfTI."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 3, padding=1)).eval()
    image = MetaTensor(torch.rand(1, 16, 16, 24, generator=torch.Generator().manual_seed(0)), affine=torch.eye(4))
    methods = importlib.import_module(f"{package}.methods").METHODS.create_all(text)
    targets = importlib.import_module(f"{package}.targets").TARGETS.create_all("MultiClassMask(1)")
    explainer_class, writer_class = importlib.import_module(package).Explainer, writer_of(package)
    inferer = SlidingWindowInferer((16, 16, 16), 2, 0.5, "gaussian")
    explainer = explainer_class(network, inferer, **without_checks(explainer_class))
    writer = writer_class(folder, methods, targets, pictures=False, **without_checks(writer_class))
    with writer.run:
        writer.explain(explainer, image, "case", methods, targets)


def measured(package: str, text: str) -> Journey:
    """Return the journey of a method's second run."""
    journey = Journey(Path(str(importlib.import_module(package).__file__)).resolve().parent)
    for profile in (None, journey):
        with tempfile.TemporaryDirectory() as folder:
            sys.setprofile(profile)
            try:
                explain(package, text, folder)
            finally:
                sys.setprofile(None)
            if not list(Path(folder).rglob("*_attr.nii.gz")):
                raise SystemExit(f"{text}: no map was written")
    return journey


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", default="esegeta_monai")
    parser.add_argument("--list", action="store_true", help="also list the files, each with its number of calls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger(args.package).setLevel(logging.ERROR)
    for name, text in METHODS.items():
        journey = measured(args.package, text)
        print(f"{name}: {journey}")
        if args.list:
            for file, calls in journey.entered.most_common():
                print(f"  {calls:6} {file.removeprefix(journey.folder)}")


if __name__ == "__main__":
    main()
