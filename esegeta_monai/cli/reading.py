"""Open what a command explains: a MONAI bundle, or an nnU-Net model folder."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from esegeta_monai.bundle.extensions import register_extensions
from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.nnunet import NnunetReader, TotalSegmentatorReader
from esegeta_monai.bundle.nnunet.totalsegmentator_task import TotalSegmentatorTask
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.bundle.static import describe_nnunet
from esegeta_monai.cli.trust import require_trust
from esegeta_monai.cli.values import choose_device, overrides
from esegeta_monai.errors import UsageError
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.names import plain_key
from esegeta_monai.utils.registry import split_calls

__all__ = ["check_options", "named_classes", "open_reader", "register_trusted", "targets_of"]


def open_reader(
    args: Namespace,
    weights: Literal["required", "optional"] = "required",
    device: torch.device | str | None = None,
) -> BundleReader:
    """Open the bundle or the model folder that the arguments name, if it is trusted.

    Args:
        args: arguments of `esegeta_monai.cli.arguments.add_bundle`, and ``device``.
        weights: see `BundleReader`.
        device: device of the network; None: that of ``args``.

    Raises:
        UsageError: both or neither are given, options do not belong together, or the folder is wrong.
        TrustError: the user has not allowed its code to run.
    """
    chosen = choose_device(args.device) if device is None else torch.device(device)
    check_options(args)
    if args.nnunet is args.bundle is args.totalsegmentator is None:
        raise UsageError(
            "give the bundle by --bundle DIR, an nnU-Net model folder by --nnunet DIR, or a task of TotalSegmentator "
            "by --totalsegmentator TASK"
        )
    require_trust(args)
    if args.totalsegmentator is not None:
        return TotalSegmentatorReader(
            args.totalsegmentator, named_classes(args), "fast" if args.fast else "default", chosen
        )
    if args.nnunet is None:
        return BundleReader(args.bundle, args.config, overrides(args.override), chosen, weights)
    step = 0.5 if args.step_size is None else args.step_size
    return NnunetReader(args.nnunet, _folds(args.folds), args.mirroring, chosen, step, previous=args.previous_stage)


def register_trusted(args: Namespace) -> None:
    """Register the methods, targets and metrics of the bundle that the arguments name, if it is trusted.

    Raises:
        UsageError: a script cannot be imported, or a name is taken.
        TrustError: the user has not allowed its code to run.
    """
    if args.bundle is not None:
        require_trust(args)
        register_extensions(args.bundle)


def check_options(args: Namespace) -> None:
    """Check that the options for a bundle, for an nnU-Net folder and for a task of TotalSegmentator are not mixed.

    Raises:
        UsageError: they are.
    """
    if args.nnunet is None and not (args.folds is args.step_size is args.previous_stage is None and args.mirroring):
        raise UsageError("--folds, --no-mirroring, --step-size and --previous-stage belong to --nnunet")
    if args.fast and args.totalsegmentator is None:
        raise UsageError("--fast belongs to --totalsegmentator")
    if args.nnunet is None and args.totalsegmentator is None:
        return
    option = "--nnunet" if args.totalsegmentator is None else "--totalsegmentator"
    if args.bundle is not None or args.config or args.override:
        raise UsageError(f"{option} replaces --bundle, and has no --config and --override")
    if args.nnunet is not None and args.totalsegmentator is not None:
        raise UsageError("--totalsegmentator replaces --nnunet: give one of them")


def targets_of(args: Namespace) -> list[str]:
    """Return the texts of ``--target``; a bare class of a task of TotalSegmentator becomes a ``MultiClassMask``.

    Raises:
        UsageError: there is no such task, or a text is the name of a class, not that of a target.
    """
    given = getattr(args, "target", None)
    texts = [given] if isinstance(given, str) else list(given or ())
    if getattr(args, "totalsegmentator", None) is None:
        _refuse_classes(args, [part for text in texts for part in split_calls(text)])
        return texts
    known = set(_task(args).classes.values())
    parts = [part.strip() for text in texts for part in (text.split(",") if "(" not in text else [text])]
    return [f"MultiClassMask({part!r})" if part in known else part for part in parts]


def _refuse_classes(args: Namespace, texts: Sequence[str]) -> None:
    """Refuse the name or number of a class in place of a target, and name the target that was meant."""
    targets = {plain_key(target.__name__) for target in TARGETS}
    bare = [text for text in texts if "(" not in text and plain_key(text) not in targets]
    if not bare:
        return
    metadata = Path(args.bundle or "", "configs", "metadata.json")
    if args.nnunet is not None:
        numbered = {number: name for name, number in describe_nnunet(args.nnunet)["classes"].items()}
        words = "segmentation"
    elif args.bundle is not None and metadata.is_file():
        read = BundleMetadata.read(args.bundle)
        numbered, words = {str(i): name for i, name in read.class_names.items()}, str(read.outputs).lower()
    else:
        return
    known = {_plain(name): name for name in numbered.values()} | numbered
    segments, scores = "segmentation" in words, "classes" in words or "classification" in words
    for text in bare:
        name = known.get(_plain(text))
        if name is not None:
            mask, score = (f"\"{target}('{name}')\"" for target in ("MultiClassMask", "ClassScore"))
            meant = mask if segments and not scores else score if scores and not segments else f"{mask} or {score}"
            raise UsageError(f"--target {text}: {name!r} is a class; write --target {meant}")


def _plain(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum())


def named_classes(args: Namespace) -> list[str]:
    """Return the classes of a task of TotalSegmentator that ``--target`` names, also inside of parentheses.

    Raises:
        UsageError: there is no such task.
    """
    known = _task(args).classes.values()
    quoted = (a or b for text in targets_of(args) for a, b in re.findall(r"'([^']*)'|\"([^\"]*)\"", text))
    return [name for name in quoted if name in known]


def _task(args: Namespace) -> TotalSegmentatorTask:
    return TotalSegmentatorTask.read(args.totalsegmentator, "fast" if args.fast else "default")


def _folds(text: str | None) -> list[int] | str | None:
    if text is None or text == "all":
        return text
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--folds {text}: give numbers separated by commas, such as 0,1, or all")
    return [int(part) for part in parts]
