"""``esegeta-monai check``: check what maps take for granted about a bundle's network and a scan, without explaining."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.arguments import add_bundle, add_network
from esegeta_monai.cli.explain import choose_device, overrides
from esegeta_monai.cli.look import scan_or_noise
from esegeta_monai.explain.explainer import Explainer

__all__ = ["add_arguments", "run"]

DESCRIPTION = """Check what maps take for granted, on one scan or on noise, and print the results. No map is computed.

verdicts: passed; handled: the assumption does not hold, and the computation takes care of it; warned: maps may be wrong
in the way that is stated; refused: no map can be computed; not checked: it cannot be checked for this network.
exit codes: 0 nothing was refused; 1 a check refused; 2 usage error"""


def add_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``check``."""
    parser.description = DESCRIPTION
    add_bundle(parser, required=True)
    parser.add_argument("--input", metavar="FILE", help="scan to check (default: noise of one window)")
    add_network(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace, *_: object) -> int:
    """Print the result of each check.

    Returns:
        0: nothing was refused; 1: a check refused.

    Raises:
        EsegetaError: the bundle or the scan cannot be read.
    """
    reader = BundleReader(args.bundle, args.config, overrides(args.override), choose_device(args.device))
    explainer = Explainer(
        reader.network,
        reader.inferer,
        reader.device,
        output=args.network_output,
        class_names=reader.class_names,
        head=args.head,
        postprocessing=reader.output_use,
    )
    results = explainer.check(scan_or_noise(reader, args.input)[None])
    if args.json:
        print(json.dumps([result.entry() for result in results], indent=2))
    else:
        for result in results:
            figure = "" if result.value is None else f" ({result.value:.2g})"
            print(f"{result.name:<12} {result.verdict:<12} {result.text}{figure}")
    return int(any(result.verdict == "refused" for result in results))
