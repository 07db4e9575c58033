"""``esegeta-monai patterns``: fit the patterns of PatternNet and PatternAttribution on scans."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from esegeta_monai.cli.cases import Preprocessor, find_cases
from esegeta_monai.cli.reading import open_reader
from esegeta_monai.cli.trust import trust_changes
from esegeta_monai.cli.values import layer_axes
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen, unwrap
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.relevance.patterns import FittedPatterns

__all__ = ["run"]


def run(args: Namespace, *_: object) -> int:
    """Fit patterns on all windows of the scans and write them; replace an existing file only with ``--overwrite``."""
    reader = open_reader(args)
    target = Path(args.output) if args.output else reader.bundle_dir / "models" / "patterns.pt"
    if target.exists() and not args.overwrite:
        raise UsageError(f"{target} already exists: use it by patterns='{target.name}', or replace it by --overwrite")
    if not target.parent.is_dir():
        raise UsageError(f"{target.parent} is not a folder: create it first")
    cases = find_cases(args.input, [name for _, name in sorted(reader.channel_names.items())])
    network, preprocess = unwrap(reader.network), Preprocessor(reader)
    model = Model(network, reader.device, output=args.network_output, layer_axes=layer_axes(args.layer_axes))

    def objectives() -> Iterator[Objective]:
        for case in cases:
            _, image, _ = preprocess(case)
            plain = image.as_tensor().float()
            yield Objective(model, plain, plan_windows(as_inferer(reader.inferer), plain.shape[1:], plain.dtype), [])

    with frozen(network):
        fitted = FittedPatterns.fit(objectives())
    fitted.save(target)
    if target.resolve().is_relative_to(reader.bundle_dir):
        trust_changes(args)
    if not args.quiet:
        count = sum(pattern is not None for pattern in fitted.patterns)
        print(f"Wrote {target}: {count} operations of {type(network).__name__}, {fitted.cases} case(s)")
        print(f"Use them with --methods \"PatternAttribution(patterns='{target}')\"")
    return 0
