"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import sys

__all__ = ["add_bundle", "add_computing_options", "add_network", "add_run_options", "add_share"]


def add_bundle(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the options that name a bundle and its config."""
    parser.add_argument("--bundle", required=required, metavar="DIR", help="MONAI bundle: the folder with configs/")
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="config of the bundle (default: configs/inference.json); several are merged in order",
    )
    parser.add_argument(
        "--override",
        action="append",
        metavar="ID=VALUE",
        help="replace the value of a config id, such as inferer#overlap=0.25; may be repeated",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the device and the output of the network."""
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--network-output",
        type=lambda text: int(text) if text.lstrip("-").isdigit() else text,
        metavar="KEY",
        help="output to explain, if the network has several (number or key)",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run that writes maps."""
    add_computing_options(parser)
    parser.add_argument(
        "--map-format",
        choices=["nifti", "input"],
        default="nifti",
        help="format of maps: NIfTI, or that of the scan if it is NRRD or MHA (needs ITK; all others NIfTI)",
    )
    parser.add_argument(
        "--yes", action="store_true", help="also run methods refused for their cost, such as an occluder of one voxel"
    )
    parser.add_argument("--overwrite", action="store_true", help="recompute finished maps")
    parser.add_argument(
        "--no-pictures",
        dest="pictures",
        action="store_false",
        help="write no PNG files and no copy of the scan for the report",
    )


def add_computing_options(parser: argparse.ArgumentParser) -> None:
    """Add precision, seed, limits, progress and logging."""
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mixed precision (default: on CUDA as the bundle says, off on the CPU)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: 0)")
    parser.add_argument(
        "--time-limit",
        type=_positive,
        metavar="SECONDS",
        help="limit per method and case; then the next method starts",
    )
    parser.add_argument(
        "--window-batch",
        type=_count,
        metavar="N",
        help="windows per forward pass (default: the inferer's)",
    )
    parser.add_argument(
        "--no-progress", dest="progress", action="store_false", default=sys.stderr.isatty(), help="hide progress bars"
    )
    parser.add_argument(
        "--log-level",
        choices=["DEBUG", "INFO", "WARNING", "ERROR"],
        type=str.upper,
        help="level of the log, on the console and in OUTPUT/esegeta.log",
    )


def add_share(parser: argparse.ArgumentParser) -> None:
    """Add what several processes share."""
    parser.add_argument(
        "--share",
        choices=["cases", "windows", "methods"],
        default="cases",
        help="how several processes (torchrun) divide the work: each its own cases (default), all one case together by "
        "windows (for large scans), or each its own methods and targets",
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value
