"""``esegeta-monai check``: check what maps take for granted about a bundle's network and a scan, without explaining."""

from __future__ import annotations

import json
import textwrap
from argparse import Namespace
from pathlib import Path

from monai.data import MetaTensor

import esegeta_monai.files as storage
from esegeta_monai.cli.cases import Preprocessor, find_cases
from esegeta_monai.cli.explain import output_use
from esegeta_monai.cli.look import scan_or_noise
from esegeta_monai.cli.reading import open_reader
from esegeta_monai.cli.values import layer_axes
from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.network.state import unwrap
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.files.grids.probe import Pipeline
from esegeta_monai.files.grids.resample import geometry_of, has_metadata
from esegeta_monai.output.place import NO_METADATA

__all__ = ["run"]


WIDTH = 110
"""Characters per line of the output."""


def run(args: Namespace, *_: object) -> int:
    """Print the result of each check.

    Returns:
        0: nothing was refused; 1: a check refused.

    Raises:
        EsegetaError: the bundle or the scan cannot be read, or several scans are given.
    """
    reader = open_reader(args)
    explainer = Explainer(
        reader.network,
        reader.inferer,
        reader.device,
        reader.amp and reader.device.type == "cuda",  # on CPUs as MONAI does
        output=args.network_output,
        class_names=reader.class_names,
        head=args.head,
        layer_axes=layer_axes(args.layer_axes),
        postprocessing=output_use(reader),
    )
    if args.input is None:
        what = "noise of one window"
        image = scan_or_noise(reader, None)
        condition = reader.sample_condition(image.shape[1:])
        more = {} if condition is None else {"network_kwargs": {"condition": condition[None]}}
        results = explainer.check(image[None], **more)
    else:
        cases = find_cases([args.input], [name for _, name in sorted(reader.channel_names.items())])
        if len(cases) != 1:
            raise UsageError(f"--input {args.input} contains {len(cases)} scans: give the one to check")
        what = cases[0].name
        preprocess = Preprocessor(reader)
        scan, image, data = preprocess(cases[0])
        results = [
            *explainer.check(image[None], **reader.case_arguments(image, data, predict=False)),
            _geometry(image, scan, preprocess.pipeline(cases[0])),
        ]
    if args.json:
        print(json.dumps([result.entry() for result in results], indent=2, ensure_ascii=False))
    else:
        print(f"{reader.name}: {type(unwrap(reader.network)).__name__}, {what}")
        print("\n".join(line for result in results for line in _lines(result)))
    return int(any(result.verdict == "refused" for result in results))


def _geometry(image: MetaTensor, scan: Path | MetaTensor, pipeline: Pipeline) -> CheckResult:
    """Return the check of the geometry for additive maps and others, whichever is worse.

    Args:
        image: the preprocessed image (C, *spatial), with its trace.
        scan: the scan (C', *scan), or its file.
        pipeline: its preprocessing.
    """
    volume = scan if isinstance(scan, MetaTensor) else storage.read_scan(scan)
    if not has_metadata(image, volume):
        return CheckResult("geometry", "warned", NO_METADATA.format("x".join(map(str, image.shape[1:]))))
    both = [geometry_of(image, volume, additive=additive, pipeline=pipeline) for additive in (True, False)]
    worst = max(both, key=lambda result: ("passed", "warned", "refused").index(result.verdict))
    return CheckResult("geometry", worst.verdict, worst.text, worst.value)


def _lines(result: CheckResult) -> list[str]:
    figure = "" if result.value is None else f" ({result.value:.2g})"
    return textwrap.wrap(
        f"{result.name:<12} {result.verdict:<12} {result.text}{figure}",
        WIDTH,
        subsequent_indent=" " * 26,
        break_on_hyphens=False,
        break_long_words=False,
    )
