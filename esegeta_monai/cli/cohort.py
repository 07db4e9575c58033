"""``esegeta-monai cohort``: analyse the maps of several cases together."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from esegeta_monai.cli.values import region_names
from esegeta_monai.output.cohort import CohortOptions, analyse, write_cohort

__all__ = ["run"]

logger = logging.getLogger("esegeta_monai")


def run(args: Namespace, *_: object) -> int:
    """Run the command.

    Returns:
        0: all cases were used, or had an empty target; 1: a case is missing, failed or was altered.

    Raises:
        EsegetaError: an option is wrong, or the folder has no maps.
    """
    options = CohortOptions(
        space=args.space,
        transforms=args.transforms or (),
        regions=args.regions,
        region_names=region_names(args.region_names) or {},
        groups=args.groups,
        correction=args.correction,
        voxels=args.voxels,
        level=args.level,
        permutations=args.permutations,
        extent=args.extent,
        targets=args.target or (),
        methods=args.method or (),
        seed=args.seed,
    )
    cohort = analyse(Path(args.output), options)
    written = write_cohort(cohort, args.write_to)
    for entry in cohort.problems:
        what = "" if entry.target is None else f", {entry.target}, {entry.method}"
        logger.error("%s%s: left out: %s", entry.case, what, entry.reason)
    if not args.quiet:
        for note in cohort.notes:
            print(note)
        for result in cohort.families:
            clusters = result.clusters
            text = clusters.reason if clusters.labels is None else f"{clusters.number} clusters"
            print(f"{result.family.target}, {result.family.method}: {len(result.cases)} case(s); {text}.")
        print(f"Open {written.page} in a browser; no network connection is needed.")
    return int(bool(cohort.problems))
