"""``esegeta-monai report``: write an HTML page per case, and an index, for an output folder."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from esegeta_monai.output.report.page import Written, write_report

__all__ = ["run", "tell_altered"]

logger = logging.getLogger("esegeta_monai")


def run(args: Namespace, *_: object) -> int:
    """Write the pages; print the path of the index, and with a single case that of its page.

    Returns:
        0: all maps are those that ``explain`` wrote; 1: a map was altered and is not shown.
    """
    written = write_report(
        Path(args.output),
        convention="neurological" if args.neurological else "radiological",
        view_3d=args.view_3d,
    )
    if not args.quiet:
        if len(written.cases) == 1:
            print(f"{next(iter(written.cases.values()))} is the report of the only case.")
        print(f"Open {written.index} in a browser; no network connection is needed.")
    return tell_altered(written)


def tell_altered(written: Written) -> int:
    """Log each map that was altered; return the exit code."""
    for text in written.altered:
        logger.error("%s", text)
    return int(bool(written.altered))
