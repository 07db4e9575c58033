"""``esegeta-monai evaluate``: evaluate the maps of a bundle's predictions by metrics."""

from __future__ import annotations

import json
import logging
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.arguments import (
    heartbeat_of,
    part_id,
)
from esegeta_monai.cli.cases import Preprocessor, ScanCase, file_of_case, find_cases
from esegeta_monai.cli.explain import (
    bundle_targets,
    each_case,
    explainer_for,
    hide_folders,
    open_log,
    provenance_of,
)
from esegeta_monai.cli.log import RunLog
from esegeta_monai.cli.reading import open_reader, register_trusted, targets_of
from esegeta_monai.cli.values import region_names
from esegeta_monai.engine.labels import label_on_grid
from esegeta_monai.engine.score import Case
from esegeta_monai.errors import EsegetaError, InputError, UsageError
from esegeta_monai.explain.costs import duration
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.explain.evaluation_costs import EvaluationCost, evaluation_table
from esegeta_monai.explain.layers import check_layers
from esegeta_monai.explain.names import ResultNames
from esegeta_monai.explain.record import KINDS, Record
from esegeta_monai.explain.settings import DEFAULT_METHODS
from esegeta_monai.files.grids.resample import geometry_of, has_metadata, to_network_grid
from esegeta_monai.files.integrity import checked_map
from esegeta_monai.files.maps import WITH_MAP
from esegeta_monai.methods.base import METHODS, Method
from esegeta_monai.output.evaluation_writer import EvaluationWriter
from esegeta_monai.output.place import NO_METADATA
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.utils.distributed import Processes, part_of, process_group
from esegeta_monai.utils.files import inside, read_json
from esegeta_monai.utils.registry import Registry, registered_names_only

__all__ = [
    "run",
]

logger = logging.getLogger("esegeta_monai")


def run(args: Namespace, log: RunLog, reader: BundleReader | None = None) -> int:
    """Run the command.

    Args:
        reader: the bundle of the arguments, already open; None: it is opened.

    Returns:
        0: every metric was measured, is undefined or does not apply; 1: a case, method or metric failed.

    Raises:
        EsegetaError: an option, the bundle or the output folder is wrong; nothing has been computed.
    """
    if args.label_value is not None and args.label is None:
        raise UsageError("--label-value selects a value of a label map: also give the label map by --label")
    if args.region_names is not None and args.regions is None and args.label is None:
        raise UsageError("--region-names names the values of a label map: also give one by --regions or --label")
    for option, text in (("label", args.label), ("regions", args.regions), ("body", args.body)):
        if text is not None and not Path(text).exists() and set(text) & set("./\\"):  # else a key of a case's data
            raise UsageError(f"--{option} {text}: no such file or folder")
    register_trusted(args)
    with process_group() as ranks:
        if args.dry_run:
            return _tell_costs(args, log, reader)
        writer = _evaluate(args, log, ranks, reader)
    if not ranks.rank:
        for problem in writer.problems:
            logger.error("%s", log.clean(problem))
        if not args.quiet:
            _summary(writer)
    return int(bool(writer.problems))


@dataclass
class _Plan:
    """Cases, maps on disk, methods, targets and metrics that the options name."""

    reader: BundleReader
    cases: list[ScanCase]
    earlier: _Earlier | None
    methods: list[Method]
    targets: list[Target]
    evaluator: Evaluator

    @classmethod
    def of(cls, args: Namespace, reader: BundleReader | None) -> _Plan:
        """Read the options; nothing is computed.

        Raises:
            EsegetaError: an option or the bundle is wrong.
        """
        part = part_id(args)
        reader = reader or open_reader(args)
        channel_names = [name for _, name in sorted(reader.channel_names.items())]
        cases = find_cases(args.input, channel_names, leave_out=Path(args.output))
        if part is not None:
            cases = part_of(cases, part, args.num_parts)
        earlier = _Earlier.read(Path(args.maps), cases) if args.maps else None
        methods = METHODS.create_all(",".join(args.methods)) if args.methods else None
        if methods is None:
            methods = earlier.methods if earlier else METHODS.create_all(list(DEFAULT_METHODS))
        targets = TARGETS.create_all(",".join(targets_of(args))) if args.target else None
        if targets is None:
            targets = earlier.targets if earlier else bundle_targets(reader)
        check_layers(reader.network, [*methods, *targets])
        evaluator = Evaluator(
            explainer_for(reader, args),
            ",".join(args.metrics) if args.metrics else None,
            with_controls=args.controls,
            outside_alarm=args.outside_alarm,
        )
        return cls(reader, cases, earlier, methods, targets, evaluator)


def _tell_costs(args: Namespace, log: RunLog, reader: BundleReader | None) -> int:
    """Print the estimated cost of each case; write nothing."""
    plan = _Plan.of(args, reader)
    hide_folders(log, plan.reader, plan.cases)
    preprocess = Preprocessor(plan.reader)
    costs: list[tuple[str, EvaluationCost]] = []
    failures: list[str] = []

    def estimate(case: ScanCase) -> None:
        _, image, data = preprocess(case)
        _beside(args, case, image, data)  # raises where a label or mask cannot be read
        costs.extend(
            (case.name, cost)
            for cost in plan.evaluator.costs(
                image,
                plan.methods,
                plan.targets,
                label=args.label is not None,
                given=plan.earlier is not None,
                **plan.reader.case_arguments(image, data, predict=False),
            )
        )

    def failed(name: str, error: Exception) -> None:
        failures.append(name)
        logger.error("%s: %s", name, error)

    each_case(plan.cases, estimate, failed, log)
    print("\n".join(evaluation_table(costs)))
    print(f"At most about {duration(sum(cost.seconds for _, cost in costs))} in total. Nothing was written.")
    return int(bool(failures))


def _evaluate(args: Namespace, log: RunLog, ranks: Processes, reader: BundleReader | None) -> EvaluationWriter:
    output, plan = Path(args.output), _Plan.of(args, reader)
    reader, cases, earlier, methods, targets = plan.reader, plan.cases, plan.earlier, plan.methods, plan.targets
    names_of_regions = region_names(args.region_names)
    writer = EvaluationWriter(output, methods, targets, provenance_of(reader, args), ranks=ranks, share=args.share)
    preprocess = Preprocessor(reader)
    open_log(log, reader, cases, output)

    def evaluate(case: ScanCase) -> None:
        scan, image, data = preprocess(case)
        if args.checks and any(
            text is not None and Path(text).exists() for text in (args.label, args.regions, args.body)
        ):
            _check_place(image, scan)
        maps, problems = earlier.maps(case, methods, targets, writer.names, image) if earlier else (None, {})
        writer.evaluate(
            plan.evaluator,
            image,
            case.name,
            sources=_sources(args, case, data, earlier),
            problems=problems,
            maps=maps,
            region_names=names_of_regions,
            label_value=args.label_value,
            **_beside(args, case, image, data),
            **reader.case_arguments(image, data),
        )

    def failed(case: str, error: Exception) -> None:
        writer.failed(case, str(error))
        logger.debug("traceback", exc_info=error.__cause__)

    heartbeat = heartbeat_of(args)
    finished = heartbeat.finished()
    for before in finished.values():
        writer.restore(before)
    left = [case for case in cases if case.name not in finished]
    # parameters of records may be names that a method looks up only when it runs
    names_of_records = earlier is not None and not (args.methods and args.target)
    with registered_names_only() if names_of_records else nullcontext():
        each_case(
            ranks.share(left) if args.share == "cases" else left, evaluate, failed, log, heartbeat, writer.take_summary
        )
    writer.join()
    return writer


def _summary(writer: EvaluationWriter) -> None:
    for text in writer.not_beating[:20]:
        print(f"no better than a control: {text}")
    if len(writer.not_beating) > 20:
        print(f"... and {len(writer.not_beating) - 20} more, marked false in the column beats_controls")
    print(f"{writer.done} case(s) evaluated, {len(writer.problems)} problem(s). The table is {writer.path}.")


# -- masks of a case -----------------------------------------------------------------------------------------------


def _beside(args: Namespace, case: ScanCase, image: MetaTensor, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return label, regions and body mask of a case on the network's grid."""
    context = Case(torch.as_tensor(image.affine).double().cpu(), data, {})
    masks: dict[str, Any] = {}
    for what, text in (("label", args.label), ("regions", args.regions), ("body", args.body)):
        if text is None:
            masks[what] = None
        else:
            masks[what] = label_on_grid(file_of_case(what, text, case, data), image.as_tensor(), context)
    return masks


def _sources(args: Namespace, case: ScanCase, data: Mapping[str, Any], earlier: _Earlier | None) -> dict[str, Any]:
    """Return the files that the numbers of a case depend on, by name, with their SHA-256, and the options."""

    def file(path: Path) -> dict[str, Any]:
        return {"file": path.name, "sha256": storage.sha256_file(path) if path.is_file() else None}

    masks = {what: text for what in ("label", "regions", "body") if (text := getattr(args, what)) is not None}
    paths = {what: Path(file_of_case(what, text, case, data)) for what, text in masks.items()}
    maps = earlier.sidecars.get(case.name, []) if earlier else []
    return {
        "scan": [file(path) for path in case.files],
        "maps": [
            {
                "target": r.target_name,
                "method": r.method_name,
                "map": r.map,
                "map_sha256": r.map_sha256,
                "sidecar": s.name,
            }
            for s, r in maps
        ],
        **{what: file(path) if path.exists() else {"data_key": masks[what]} for what, path in paths.items()},
        "options": {"label_value": args.label_value, "controls": args.controls, "outside_alarm": args.outside_alarm},
    }


def _check_place(image: MetaTensor, scan: Path | MetaTensor) -> None:
    """Check that masks on the scan's grid can be brought to the image (C, *spatial).

    Raises:
        InputError: nothing connects the image with the scan, or their contents contradict each other.
    """
    volume = scan if isinstance(scan, MetaTensor) else storage.read_scan(scan)
    if not has_metadata(image, volume):
        raise InputError(NO_METADATA.format("x".join(map(str, image.shape[1:]))) + "; label maps have no place on it")
    result = geometry_of(image, volume, additive=False)
    if result.verdict == "refused":
        raise InputError(result.text)
    if result.verdict == "warned":
        logger.warning("%s", result.text)


# -- maps of an earlier run ----------------------------------------------------------------------------------------


@dataclass
class _Earlier:
    """The maps in the output folder of ``explain``: sidecars and their records by case, methods and targets."""

    folder: Path
    sidecars: dict[str, list[tuple[Path, Record]]]
    methods: list[Method]
    targets: list[Target]

    @classmethod
    def read(cls, folder: Path, cases: Sequence[ScanCase]) -> _Earlier:
        """Read the sidecars of these cases.

        Raises:
            UsageError: the folder has no map of them, or a method or target cannot be recreated from its record.
        """
        if not folder.is_dir():
            what = "it is a file" if folder.exists() else "no such folder"
            raise UsageError(f"--maps {folder}: {what}; give the output folder of 'explain'")
        wanted = {case.name for case in cases}
        sidecars: dict[str, list[tuple[Path, Record]]] = {}
        for file in sorted(folder.rglob("*.json")):
            if not inside(file, folder):
                logger.warning("%s is a link to another folder and is not read", file.name)
                continue
            content = read_json(file) or {}
            record = Record.from_json(content)
            if record.map and record.case in wanted and record.status in WITH_MAP:
                if not all(isinstance(content.get(key), KINDS[key]) for key in NEEDED):
                    logger.warning("%s does not name the method and target of its map: skipped", file.name)
                    continue
                if record.input:
                    raise UsageError(
                        f"{file.name}: maps of several inputs cannot be read from disk: omit --maps to compute them"
                    )
                sidecars.setdefault(str(record.case), []).append((file, record))
        if not sidecars:
            raise UsageError(f"--maps {folder} has no map of {', '.join(sorted(wanted)[:3])}; run 'explain' first")
        records = [record for several in sidecars.values() for _, record in several]
        return cls(
            folder,
            sidecars,
            _revived([(str(r.method), r.parameters or {}) for r in records], METHODS),
            _revived([(str(r.target), r.target_parameters or {}) for r in records], TARGETS),
        )

    def maps(
        self,
        case: ScanCase,
        methods: Sequence[Method],
        targets: Sequence[Target],
        names: ResultNames,
        image: MetaTensor,
    ) -> tuple[dict[tuple[str, str], Tensor], dict[str, str]]:
        """Return maps on the network's grid, and the errors of unreadable ones, by the names of target and method."""
        maps: dict[tuple[str, str], Tensor] = {}
        problems: dict[str, str] = {}
        for sidecar, record in self.sidecars.get(case.name, []):
            method = _same(methods, record.method, record.parameters)
            target = _same(targets, record.target, record.target_parameters)
            if method is None or target is None:
                continue
            key = (names.target(target, str(record.target_name)), names.method(method))
            try:
                path = checked_map(sidecar, {"map": record.map, "map_sha256": record.map_sha256}, self.folder)
                values = storage.read_scan(path, spatial_dims=2 if image.ndim == 3 else None)
            except InputError as error:
                problems[", ".join(key)] = str(error).replace(f"{sidecar.parent}{os.sep}", "")
                continue
            maps[key] = to_network_grid(values, image, additive=bool(record.additive))
        if not maps and not problems:
            raise UsageError(f"{case.name}: no map on disk is of these methods and targets")
        return maps, problems


NEEDED = ("method", "parameters", "target", "target_parameters", "target_name", "map")
"""Entries of a sidecar that the evaluation of its map requires."""


def _revived(recorded: Sequence[tuple[str, Mapping[str, Any]]], registry: Registry[Any]) -> list[Any]:
    """Create one instance for each recorded class and its parameters."""
    instances: dict[str, Any] = {}
    for name, parameters in recorded:
        key = json.dumps([name, parameters], sort_keys=True)
        if key in instances:
            continue
        try:
            with registered_names_only():
                instances[key] = registry.create({"_target_": name, **_nested(parameters)})
        except EsegetaError as error:
            raise UsageError(
                f"the {registry.kind} {name} of an earlier map cannot be recreated from its record ({error}): give it "
                f"by --{registry.kind}{'s' if registry.kind == 'method' else ''}"
            ) from error
    return list(instances.values())


def _nested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as in a config: objects by ``_target_``."""
    return {
        k: {"_target_": v["name"], **_nested({a: b for a, b in v.items() if a != "name"})}
        if isinstance(v, Mapping) and "name" in v
        else v
        for k, v in parameters.items()
    }


def _same(things: Sequence[Any], kind: str | None, parameters: Mapping[str, Any] | None) -> Any:
    text = json.dumps(parameters, sort_keys=True)
    fitting = (t for t in things if type(t).__name__ == kind and json.dumps(t.parameters, sort_keys=True) == text)
    return next(fitting, None)
