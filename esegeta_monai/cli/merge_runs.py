"""``esegeta-monai merge-runs``: join the parts of a run that several machines have computed."""

from __future__ import annotations

import logging
from argparse import Namespace

from esegeta_monai.output.merge import merge_runs

__all__ = ["run"]

logger = logging.getLogger("esegeta_monai")


def run(args: Namespace, *_: object) -> int:
    """Join the parts; print the number of results by status."""
    joined = merge_runs(args.output, args.others)
    for name in joined.unfinished:
        logger.error("%s: this part is not finished; run its command again", name)
    if not args.quiet:
        counts = ", ".join(f"{n} {status.replace('_', ' ')}" for status, n in joined.counts.items()) or "no results"
        print(f"{joined.cases} case(s): {counts}; {joined.copied} file(s) copied into {args.output}.")
    return joined.exit_code
