"""``esegeta-monai concepts``: the most relevant channels of a layer over scans, with the regions that show them; with
``--concept``, tests of given concepts; with ``--find``, concepts that are found."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import esegeta_monai.files as storage
from esegeta_monai.cli import concept_tests
from esegeta_monai.cli.cases import Preprocessor, ScanCase, find_cases
from esegeta_monai.cli.explain import bundle_targets, check_layers, each_case, explainer_for, open_log
from esegeta_monai.cli.log import RunLog
from esegeta_monai.cli.reading import open_reader, register_trusted, targets_of
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.concepts import CaseConcepts, case_concepts, channel_region, ranked_channels
from esegeta_monai.methods.relevance.concepts import ConceptRelevance
from esegeta_monai.output.report.concepts import ChannelEntry, RegionEntry, region_entry, write_gallery
from esegeta_monai.targets.base import TARGETS

__all__ = ["run"]


def run(args: Namespace, log: RunLog) -> int:
    """Run the command.

    Returns:
        0: all scans were used, or had an empty target; 1: a scan failed.

    Raises:
        EsegetaError: an option, the bundle or the output folder is wrong.
    """
    register_trusted(args)
    reader, output = open_reader(args), Path(args.output)
    cases = find_cases(args.input, [name for _, name in sorted(reader.channel_names.items())], leave_out=output)
    targets = TARGETS.create_all(",".join(targets_of(args))) if args.target else bundle_targets(reader)
    storage.writable_folder(output)
    given = bool(args.concept or args.concept_cases)
    if given and args.find:
        raise UsageError("--find looks for concepts, --concept tests given ones: run one after the other")
    if not given and args.layer and len(args.layer) > 1:
        raise UsageError("several layers are tested with --concept only: give --layer once")
    check_layers(reader.network, [*map(ConceptRelevance, args.layer or ()), *targets])
    preprocess, explainer = Preprocessor(reader), explainer_for(reader, args)
    open_log(log, reader, cases, output)
    if given or args.find:
        run_other = concept_tests.test if given else concept_tests.find
        return run_other(args, log, reader, cases, targets, explainer)
    layer = args.layer[0] if args.layer else None
    entries: list[CaseConcepts] = []
    scans: dict[str, ScanCase] = {case.name: case for case in cases}
    problems: list[str] = []

    def see(case: ScanCase) -> None:
        image, inputs = concept_tests.batch_of(case, preprocess, reader)
        entries.extend(case_concepts(explainer, image, case.name, targets, layer, **inputs))

    each_case(cases, see, concept_tests.failures(problems), log)
    if not entries:
        raise UsageError("no scan has a voxel of the target, so no channel is relevant: give other scans or --target")
    rows: list[ChannelEntry] = []
    for name in dict.fromkeys(e.target for e in entries):
        alike = [e for e in entries if e.target == name]
        for channel, share in ranked_channels(alike, args.channels):
            best = sorted(alike, key=lambda e: -float(e.share[channel]))[: args.regions]
            shown: list[RegionEntry] = []
            for entry in best:
                image, inputs = concept_tests.batch_of(scans[entry.case], preprocess, reader)
                with log.of(entry.case):
                    region = channel_region(explainer, image, targets, entry, channel, **inputs)
                shown.append(region_entry(region, image, output))
            rows.append(ChannelEntry(name, alike[0].layer, channel, share, len(alike), shown))
    page = write_gallery(output, rows, entries)
    if not args.quiet:
        print(f"{len(entries)} scan(s) with a target, {len(problems)} problem(s). The page is {page}.")
    return int(bool(problems))
