"""Arguments shared by several commands."""

from __future__ import annotations

import argparse
import sys

from esegeta_monai.errors import UsageError
from esegeta_monai.utils.choices import HEADS, TRUST_VARIABLE
from esegeta_monai.utils.heartbeat import Heartbeat

__all__ = [
    "add_bundle",
    "add_computing_options",
    "add_hard_limit",
    "add_head",
    "add_model",
    "add_network",
    "add_parts",
    "add_run_options",
    "add_share",
    "add_trust",
    "heartbeat_of",
    "part_id",
]


def add_bundle(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the options for a bundle and its config."""
    parser.add_argument("--bundle", required=required, metavar="DIR", help="folder of the MONAI bundle")
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="config file of the bundle (default: configs/inference.json); if repeated, the files are merged in order",
    )
    parser.add_argument(
        "--override",
        action="append",
        metavar="ID=VALUE",
        help="replace a value of the config, for example inferer#overlap=0.25; may be repeated",
    )


def _step_size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and up to 1")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options for a bundle or an nnU-Net model folder, see `esegeta_monai.cli.reading.open_reader`."""
    add_bundle(parser, required=False)
    parser.add_argument("--nnunet", metavar="DIR", help="trained nnU-Net v2 model folder, in place of a bundle")
    parser.add_argument(
        "--totalsegmentator",
        metavar="TASK",
        help="task of TotalSegmentator, such as total, in place of a bundle; --target liver chooses the class and, if "
        "the task has several models, the model",
    )
    parser.add_argument("--fast", action="store_true", help="TotalSegmentator's model of 3 mm")
    parser.add_argument(
        "--folds",
        metavar="LIST",
        help="folds of the nnU-Net model, such as 0,1, or all for fold_all (default: all numbered folds)",
    )
    parser.add_argument(
        "--step-size",
        type=_step_size,
        metavar="SHARE",
        help="distance of nnU-Net's windows in window sizes (default: 0.5, as nnUNetv2_predict)",
    )
    parser.add_argument(
        "--previous-stage",
        metavar="DIR",
        help="first stage of an nnU-Net cascade: its model folder, or the folder of its segmentations (default: the "
        "model folder beside the second stage's)",
    )
    parser.add_argument(
        "--no-mirroring",
        dest="mirroring",
        action="store_false",
        help="leave out nnU-Net's mirrored views, which its checkpoint may ask for",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option that allows a bundle's code to run."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let the bundle's code run, and remember its contents; without it you are asked once (see 'esegeta-monai "
        f"info', which lists the code; {TRUST_VARIABLE}=1 allows all bundles)",
    )


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the options for the trust in the bundle, the device and the output of the network, which is built."""
    add_trust(parser)
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda if available)")
    parser.add_argument(
        "--network-output",
        type=lambda text: int(text) if text.lstrip("-").isdigit() else text,
        metavar="KEY",
        help="output to explain if the network has several: its number, key, or path (classification.0)",
    )
    parser.add_argument(
        "--layer-axes",
        action="append",
        default=[],
        metavar="LAYER: AXES",
        help="axes of a layer's output where they cannot be found out: 'encoder: n x y z c' (channels last), 'vit.3: n "
        "1+(x=4 y=4 z=2) c' (tokens after a class token); can be repeated",
    )


def add_head(parser: argparse.ArgumentParser) -> None:
    """Add the option for the meaning of the network's output."""
    parser.add_argument(
        "--head",
        choices=HEADS,
        metavar="KIND",
        help=f"meaning of the network's output: {', '.join(HEADS)} (default: determined from the network and the "
        "bundle's postprocessing, see 'esegeta-monai check')",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run that writes maps."""
    add_computing_options(parser)
    parser.add_argument(
        "--map-format",
        choices=["nifti", "input", "dicom"],
        default="nifti",
        help="format of the maps; 'input' keeps NRRD and MHA (needs ITK), all others become NIfTI; 'dicom' also writes "
        "map, target and picture as DICOM, for scans that are DICOM series (needs highdicom; default: nifti)",
    )
    parser.add_argument(
        "--check-maps",
        action="store_true",
        help="also check each finished map by an independent computation, which takes further passes of the network",
    )
    parser.add_argument("--yes", action="store_true", help="also run methods refused because of their estimated cost")
    parser.add_argument("--overwrite", action="store_true", help="recompute finished maps")
    parser.add_argument(
        "--no-pictures",
        dest="pictures",
        action="store_false",
        help="do not write PNG files, nor the copy of the scan that the report shows",
    )


def add_computing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for precision, seed, limits, progress and logging."""
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="use mixed precision (default: the bundle's setting on CUDA, off on the CPU)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: 0)")
    parser.add_argument(
        "--time-limit",
        type=_positive,
        metavar="SECONDS",
        help="stop a method after this time on a case and continue with the next method",
    )
    parser.add_argument(
        "--window-batch",
        type=count,
        metavar="N",
        help="windows per forward pass (default: the inferer's)",
    )
    parser.add_argument(
        "--memory-format",
        choices=["contiguous", "channels_last", "auto"],
        help="order of values in memory; auto measures both on the first windows and keeps its choice in the run "
        "(default: by a fixed rule for device and operations)",
    )
    parser.add_argument(
        "--no-checks",
        dest="checks",
        action="store_false",
        help="do not check what maps take for granted (see 'esegeta-monai check')",
    )
    parser.add_argument(
        "--no-progress",
        dest="progress",
        action="store_false",
        default=sys.stderr.isatty(),
        help="show no progress bars",
    )
    parser.add_argument(
        "--log-level",
        choices=["DEBUG", "INFO", "WARNING", "ERROR"],
        type=str.upper,
        help="lowest level of log messages, on the console and in OUTPUT/esegeta.log",
    )


def add_share(parser: argparse.ArgumentParser) -> None:
    """Add the option for the work shared by several processes."""
    parser.add_argument(
        "--share",
        choices=["cases", "windows", "methods"],
        default="cases",
        help="how several processes (torchrun) divide the work: by cases (default), by the windows of each case (for "
        "large scans), or by methods and targets",
    )


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Add the options that divide the cases of a run over machines."""
    parser.add_argument(
        "--num-parts",
        type=count,
        default=1,
        metavar="N",
        help="divide the cases into N parts, for machines that share the output folder (default: 1)",
    )
    parser.add_argument(
        "--part-id",
        type=int,
        metavar="I",
        help="number of this part, 0 to N-1; see also 'esegeta-monai merge-runs'",
    )


def add_hard_limit(parser: argparse.ArgumentParser) -> None:
    """Add the option for the limit that also ends a pass that hangs."""
    parser.add_argument(
        "--hard-time-limit",
        type=_positive,
        metavar="SECONDS",
        help="kill and restart this command, without the result, where one result takes longer, also inside a pass",
    )


def heartbeat_of(options: argparse.Namespace) -> Heartbeat:
    """Return the heartbeat of a command that `esegeta_monai.cli.main` found to be watched, else one that is not."""
    return getattr(options, "heartbeat", None) or Heartbeat()


def part_id(options: argparse.Namespace) -> int | None:
    """Return the number of the part that the options choose; None: the run is not divided.

    Raises:
        UsageError: only one of the two options is given, or the number is out of range.
    """
    parts, part = getattr(options, "num_parts", 1), getattr(options, "part_id", None)
    if parts == 1 and part in (None, 0):
        return None
    if part is None:
        raise UsageError(f"--num-parts {parts} also needs the number of this part: --part-id 0 to {parts - 1}")
    if not 0 <= part < parts:
        raise UsageError(f"--part-id {part}: with --num-parts {parts} it is a number from 0 to {parts - 1}")
    return part


def count(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value
