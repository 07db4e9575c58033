"""``esegeta-monai concepts`` with given concepts (TCAV), or for concepts that are found (ACE, CRAFT)."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.cases import Preprocessor, ScanCase, file_of_case, find_cases, fitting_files
from esegeta_monai.cli.explain import each_case
from esegeta_monai.cli.log import RunLog
from esegeta_monai.engine.labels import label_on_grid
from esegeta_monai.engine.score import Case
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.concept_cases import CaseActivations, case_activations
from esegeta_monai.explain.concept_discovery import CaseUnits, case_units, find_concepts
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.tcav import examples_of_cases, examples_of_masks, needed_random_concepts, tcav
from esegeta_monai.output.report.found_concepts import FoundEntry, part_entry, write_found
from esegeta_monai.output.report.tested_concepts import write_tests
from esegeta_monai.targets.base import Target

__all__ = ["batch_of", "failures", "find", "named_paths", "test"]

logger = logging.getLogger("esegeta_monai")

NEGATIVES = 8
"""Random masks of each case that serve as examples without a concept."""


def named_paths(option: str, texts: Sequence[str] | None) -> dict[str, str]:
    """Parse ``NAME=PATH`` options.

    Raises:
        UsageError: a text of another form, or the same name twice.

    >>> named_paths("concept", ["lesion=masks/"])
    {'lesion': 'masks/'}
    """
    result: dict[str, str] = {}
    for text in texts or ():
        name, _, path = text.partition("=")
        if not name.strip() or not path.strip() or name.strip() in result:
            raise UsageError(f"--{option} {text!r}: write NAME=PATH, each name once")
        result[name.strip()] = path.strip()
    return result


def test(
    args: Namespace, log: RunLog, reader: BundleReader, cases: Sequence[ScanCase], targets: Sequence[Target],
    explainer: Explainer,
) -> int:  # fmt: skip
    """Test concepts that are given by masks or by whole cases.

    Returns:
        0: all cases were used; 1: a case failed.

    Raises:
        EsegetaError: an option is wrong, or there are too few cases or random concepts.
    """
    masks, whole = named_paths("concept", args.concept), named_paths("concept-cases", args.concept_cases)
    if set(masks) & set(whole):
        raise UsageError(f"concept {min(set(masks) & set(whole))!r} is given by masks and by cases: rename one")
    layers: list[str | None] = list(args.layer) if args.layer else [None]
    least = needed_random_concepts((len(masks) + len(whole)) * len(layers) * len(targets), args.alpha)
    if args.random < least:
        raise UsageError(f"--random {args.random}: this number of tests needs at least {least} random concepts")
    channel_names = [name for _, name in sorted(reader.channel_names.items())]
    shown = {name: find_cases([path], channel_names) for name, path in whole.items()}
    known = {case.name for case in cases}
    every = [*cases, *{c.name: c for several in shown.values() for c in several if c.name not in known}.values()]
    preprocess = Preprocessor(reader)
    rows: list[CaseActivations] = []
    problems: list[str] = []

    def see(case: ScanCase) -> None:
        image, data = preprocess(case)[1:]
        own = {name: _mask(name, path, case, image, data) for name, path in masks.items()}
        body = None
        if args.body is not None:
            body = _on_grid(file_of_case("body", args.body, case, data), image, data)
        rows.extend(
            case_activations(
                explainer,
                MetaTensor(image.as_tensor()[None], affine=image.affine),
                case.name,
                targets,
                layers,
                {name: mask for name, mask in own.items() if mask is not None},
                randoms=args.random + NEGATIVES,
                body=body,
                **reader.case_arguments(image, data),
            )
        )

    each_case(every, see, failures(problems), log)
    examples = []
    for layer in dict.fromkeys(row.layer for row in rows):
        here = [row for row in rows if row.layer == layer]
        examples += [examples_of_masks(here, name, args.random) for name in masks]
        for name, several in shown.items():
            with_it = [case.name for case in several]
            examples.append(examples_of_cases(here, name, with_it, args.random, explainer.settings.seed))
    explained = [row for row in rows if row.case in known]
    tests = tcav(
        examples,
        explained,
        alpha=args.alpha,
        statistic=args.statistic,
        where=args.where,
        seed=explainer.settings.seed,
    )
    page = write_tests(Path(args.output), tests, args.alpha)
    if not args.quiet:
        significant = sum(t.verdict == "significant" for t in tests)
        print(f"{len(tests)} test(s), {significant} significant, {len(problems)} problem(s). The page is {page}.")
    return int(bool(problems))


def find(
    args: Namespace, log: RunLog, reader: BundleReader, cases: Sequence[ScanCase], targets: Sequence[Target],
    explainer: Explainer,
) -> int:  # fmt: skip
    """Find concepts in the parts of the cases and write their gallery.

    Returns:
        0: all cases were used; 1: a case failed.

    Raises:
        EsegetaError: an option is wrong, or there are too few cases.
    """
    if args.layer and len(args.layer) > 1:
        raise UsageError("--find looks at one layer: give --layer once")
    preprocess = Preprocessor(reader)
    scans = {case.name: case for case in cases}
    units: list[CaseUnits] = []
    problems: list[str] = []

    def see(case: ScanCase) -> None:
        image, inputs = batch_of(case, preprocess, reader)
        layer = args.layer[0] if args.layer else None
        units.append(case_units(explainer, image, case.name, targets, layer, args.units, **inputs))

    each_case(cases, see, failures(problems), log)
    concepts = find_concepts(units, args.find, args.concepts, seed=explainer.settings.seed)
    entries = []
    for concept in concepts:
        order = sorted(units, key=lambda u: -float(np.max(concept.strength[u.case], initial=0)))
        best = [u for u in order if concept.strength[u.case].max(initial=0) > 0][: args.regions]
        images = (batch_of(scans[unit.case], preprocess, reader)[0] for unit in best)  # one in memory
        parts = [part_entry(concept, unit, image, Path(args.output)) for unit, image in zip(best, images)]
        entries.append(FoundEntry(concept, units[0].layer, parts))
    page = write_found(Path(args.output), args.find, entries)
    if not args.quiet:
        named = sum(c.named for c in concepts)
        print(f"{len(concepts)} concept(s), {named} reappear in both halves, {len(problems)} problem(s). ", end="")
        print(f"The page is {page}.")
    return int(bool(problems))


def batch_of(case: ScanCase, preprocess: Preprocessor, reader: BundleReader) -> tuple[MetaTensor, dict[str, Any]]:
    """Return the preprocessed image (1, C, *spatial) and the further arguments of an explanation of a case."""
    image, data = preprocess(case)[1:]
    return MetaTensor(image.as_tensor()[None], affine=image.affine), reader.case_arguments(image, data)


def failures(problems: list[str]) -> Callable[[str, Exception], None]:
    """Return a function that logs the error of a case and adds it to ``problems``."""

    def failed(case: str, error: Exception) -> None:
        problems.append(f"{case}: {error}")
        logger.error("%s: %s", case, error)

    return failed


def _mask(name: str, path: str, case: ScanCase, image: MetaTensor, data: Mapping[str, Any]) -> Tensor | None:
    """Return a concept's mask (*spatial) on the network's grid; None: the folder has none of this case."""
    if Path(path).is_dir():
        files = fitting_files(Path(path), case.name)
        if not files:
            return None
        if len(files) > 1:
            listed = ", ".join(f.name for f in files[:5])
            raise UsageError(f"--concept {name}={Path(path).name}: several files fit {case.name}: {listed}")
        path = str(files[0])
    elif not Path(path).exists() and path not in data:
        raise UsageError(f"--concept {name}={path}: no such file or folder")
    return _on_grid(path, image, data) > 0


def _on_grid(path: str, image: MetaTensor, data: Mapping[str, Any]) -> Tensor:
    context = Case(torch.as_tensor(image.affine).double().cpu(), data, {})
    return label_on_grid(path, image.as_tensor(), context)
