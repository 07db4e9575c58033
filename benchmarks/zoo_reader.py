"""Read every bundle below a folder and print one row per bundle: its parts, or the named error of each missing part.

    python benchmarks/zoo_reader.py PATH [--config configs/inference.json] [--markdown]

PATH is a checkout of bundles (a folder of folders with `configs/`). If checkpoints are missing, networks keep random
weights. The exit status is 1 if a bundle raised anything but a named error of the package.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path

from esegeta_monai.bundle import BundleReader
from esegeta_monai.errors import EsegetaError

PARTS = ("network", "inferer", "preprocessing", "postprocessing", "amp", "image_key", "output", "classes", "channels")


def read_part(reader: BundleReader, part: str) -> str:
    """Describe one part of a bundle in a few letters; errors of the reader are raised."""
    if part in ("network", "inferer"):
        return type(getattr(reader, part)).__name__
    if part in ("preprocessing", "postprocessing"):
        return str(len(getattr(reader, part).transforms))
    if part == "amp":
        return "yes" if reader.amp else "no"
    if part == "output":
        return f"{reader.output_postfix}{reader.output_ext}{'' if reader.separate_folder else ' flat'}"
    if part == "classes":
        background = "" if reader.background is None else f" (background {reader.background})"
        return f"{len(reader.class_names)}{background}"
    if part == "channels":
        return str(len(reader.channel_names))
    return str(getattr(reader, part))


def read_bundle(folder: Path, config: str | None) -> tuple[list[str], list[str], bool]:
    """Return the row of one bundle, its full error messages, and True if all errors were named."""
    try:
        reader = BundleReader(folder, config, weights="optional")
    except EsegetaError as error:
        return [folder.name, *["-"] * (len(PARTS) + 2)], [f"bundle: {error}"], True
    cells, errors, named = [], [], True
    for part in PARTS:
        try:
            cells.append(read_part(reader, part))
        except EsegetaError as error:
            cells.append(type(error).__name__)
            errors.append(f"{part}: {type(error).__name__}: {error}")
        except Exception as error:  # this script checks that the reader raises nothing else
            cells.append(f"!{type(error).__name__}")
            errors.append(f"{part}: UNNAMED {type(error).__name__}: {error}")
            named = False
    handlers = reader.id_of("handlers") if reader.has("handlers") else "none"
    try:
        weights = reader.weight_source.found_in
    except EsegetaError as error:
        weights = type(error).__name__
    return [folder.name, *cells, f"{handlers}/{reader.run_id}", weights], errors, named


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--config", help="config file inside each bundle (default: configs/inference.*)")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    folders = sorted(folder for folder in options.path.iterdir() if (folder / "configs").is_dir())
    print("| bundle |", " | ".join(PARTS), "| handlers/run | weights by | s |")
    print("|---" * (len(PARTS) + 4) + "|")
    complaints, all_named, whole = [], True, 0
    for folder in folders:
        start = time.perf_counter()
        row, errors, named = read_bundle(folder, options.config)
        print("|", " | ".join(row), f"| {time.perf_counter() - start:.1f} |", flush=True)
        complaints += [f"- {folder.name}: {error}" for error in errors]
        all_named &= named
        whole += not errors
    print(f"\n{whole} of {len(folders)} bundles read completely.", *complaints, sep="\n")
    return 0 if all_named else 1


if __name__ == "__main__":
    sys.exit(main())
