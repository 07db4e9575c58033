"""``esegeta-monai report``: one HTML page a case, and an index, from what lies in an output folder."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from esegeta_monai.output.report.page import write_report

__all__ = ["add_arguments", "run"]


DESCRIPTION = """\
Writes OUTPUT/CASE/CASE_report.html for each case and OUTPUT/index.html, from what 'explain' and, where it
was run, 'evaluate' left in OUTPUT; also after a run that failed or was stopped. Each page is complete in itself and
opens in a browser without a network. It names the cases as you called them, and no folder and no scan file."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``report``."""
    parser.description = DESCRIPTION
    parser.add_argument("output", metavar="OUTPUT", help="the output folder of 'explain'")
    parser.add_argument(
        "--neurological", action="store_true", help="patient's left on the viewer's left (default: radiological)"
    )
    parser.add_argument(
        "--view-3d",
        action="store_true",
        help="add a 3D view (needs NiiVue, which nilearn carries; 2.3 MB a page); a head can be recognised by its face",
    )


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
