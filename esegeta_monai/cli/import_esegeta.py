"""``esegeta-monai import-esegeta``: turn a configuration of TorchEsegeta into a bundle's overlay."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from esegeta_monai.bundle.overlay import OVERLAY, fitted_overlay
from esegeta_monai.bundle.torchesegeta import read_torchesegeta
from esegeta_monai.cli.overlay import free_file, read_bundle, unevaluated_config, write_text
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import METHODS
from esegeta_monai.targets import TARGETS

__all__ = ["run"]


def run(args: Namespace, *_: object) -> int:
    """Write the overlay, and print its methods and what has no counterpart. Nothing of the bundle is imported.

    Raises:
        UsageError: the overlay exists, or no method is left.
    """
    imported = read_torchesegeta(args.config_file, unused=args.all, layers=_renamed(args.layer or ()))
    METHODS.create_all(imported.methods)  # a method that cannot be built ends here, not in the run
    TARGETS.create_all(imported.targets)
    reader = read_bundle(args)
    overlay = fitted_overlay(unevaluated_config(args), reader.metadata)
    overlay["explain_methods"] = imported.methods
    if imported.targets:
        overlay["explain_targets"] = imported.targets
    if imported.time_limit is not None:
        overlay["explain_handler"]["time_limit"] = imported.time_limit
    text = json.dumps(overlay, indent=4, ensure_ascii=False) + "\n"
    target = free_file(Path(args.output) if args.output else reader.bundle_dir / "configs" / OVERLAY, OVERLAY, text)
    write_text(target, text)
    print(f"{len(imported.methods)} methods:", *(f"  {m}" for m in imported.methods), sep="\n")
    if imported.targets:
        print("targets:", *(f"  {t}" for t in imported.targets), sep="\n")
    if imported.notes:
        print("translated in another way, or without counterpart:", *(f"  {n}" for n in imported.notes), sep="\n")
    print(f"Wrote {target}. 'esegeta-monai layers --bundle {args.bundle}' lists the layers that methods can name.")
    return 0


def _renamed(given: Sequence[str]) -> dict[str, str]:
    """Return our names of layers by theirs, from ``THEIRS=OURS``."""
    pairs = [text.partition("=") for text in given]
    for original, equals, own in pairs:
        if not (original and equals and own):
            raise UsageError(f"--layer {original}{equals}{own}: give THEIRS=OURS, such as --layer Conv5=model.4")
    return {original: own for original, _, own in pairs}
