"""``esegeta-monai report``: one HTML page a case, and an index, from what lies in an output folder."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from esegeta_monai.output.report.page import write_report

__all__ = ["run"]


def run(args: Namespace, *_: object) -> int:
    """Writes the pages and says where the index lies; with one case, where its page lies too."""
    written = write_report(
        Path(args.output),
        convention="neurological" if args.neurological else "radiological",
        view_3d=args.view_3d,
    )
    if not args.quiet:
        if len(written.cases) == 1:
            print(f"{next(iter(written.cases.values()))} is the report of the only case.")
        print(f"Open {written.index} in a browser: it needs no network.")
    return 0
