"""``esegeta-monai merge-runs``: join the parts of a run that several machines have computed."""

from __future__ import annotations

import logging
from argparse import ArgumentParser, Namespace

from esegeta_monai.output.merge import merge_runs

__all__ = ["add_arguments", "run"]

logger = logging.getLogger("esegeta_monai")

DESCRIPTION = """\
Writes OUTPUT/run.json from the journals of all parts (--num-parts, --part-id) that wrote into OUTPUT. If the parts had
output folders of their own, give these too: their maps, records and rows of metrics.csv are copied into OUTPUT first.
A file that two folders have with different contents is refused, and nothing is written."""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``merge-runs``."""
    parser.description = DESCRIPTION
    parser.epilog = "exit codes: 0 all parts finished without a failure; 1 a part is not finished, or a result failed"
    parser.add_argument("output", metavar="OUTPUT", help="the output folder of the whole run")
    parser.add_argument("others", nargs="*", metavar="FOLDER", help="output folders of further parts")


def run(args: Namespace, *_: object) -> int:
    """Join the parts; print the number of results by status."""
    joined = merge_runs(args.output, args.others)
    for name in joined.unfinished:
        logger.error("%s: this part is not finished; run its command again", name)
    if not args.quiet:
        counts = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in joined.counts.items()) or "no results"
        print(f"{joined.cases} case(s): {counts}; {joined.copied} file(s) copied into {args.output}.")
    return joined.exit_code
