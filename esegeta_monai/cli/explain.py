"""``esegeta-monai explain``: explain the predictions of a bundle on the cases of a folder."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import esegeta_monai.files as storage
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.arguments import (
    heartbeat_of,
    part_id,
)
from esegeta_monai.cli.cases import PreparedCase, Preprocessor, ScanCase, find_cases
from esegeta_monai.cli.log import RunLog, reason
from esegeta_monai.cli.reading import open_reader, register_trusted, targets_of
from esegeta_monai.cli.report import tell_altered
from esegeta_monai.cli.values import layer_axes, overrides
from esegeta_monai.engine.head import Postprocessing
from esegeta_monai.engine.network.model import out_of_memory
from esegeta_monai.engine.network.state import unwrap, weights_hash
from esegeta_monai.errors import EsegetaError, NetworkError, OutputLost, RankLost, UsageError
from esegeta_monai.explain.costs import Cost, duration, table
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.layers import check_layers
from esegeta_monai.explain.settings import DEFAULT_METHODS, Checks, default_targets
from esegeta_monai.files.layout import Layout
from esegeta_monai.methods.base import METHODS, Method
from esegeta_monai.output.place import PlaceChecks
from esegeta_monai.output.report.page import write_report
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.utils.distributed import Processes, part_of, process_group
from esegeta_monai.utils.heartbeat import Heartbeat

__all__ = [
    "bundle_targets",
    "each_case",
    "explain_cases",
    "explainer_for",
    "hide_folders",
    "open_log",
    "output_use",
    "prepared_case",
    "requested",
    "run",
]


logger = logging.getLogger("esegeta_monai")


def run(args: Namespace, log: RunLog) -> int:
    """Run the command; all options are checked before anything is computed.

    Returns:
        0: all done, including empty targets; 1: a case or method failed.

    Raises:
        EsegetaError: an option, the bundle or the output folder is wrong; nothing has been computed.
    """
    register_trusted(args)
    methods, targets = requested(args)
    output = Path(args.output)
    part = part_id(args)
    with process_group() as ranks:
        reader = open_reader(args)
        channel_names = [name for _, name in sorted(reader.channel_names.items())]
        cases = find_cases(args.input, channel_names, leave_out=output)
        if part is not None:
            cases = part_of(cases, part, args.num_parts)
        if args.dry_run:
            return _tell_costs(reader, cases, methods, targets, args, log)
        writer = explain_cases(reader, cases, methods, targets, output, args, log, ranks, heartbeat_of(args))
    summary = ", ".join(f"{n} {status}" for status, n in writer.run.summary.items()) or "nothing to do"
    if not args.quiet and not ranks.rank:
        print(f"{summary.replace('_', ' ')}. Maps, pictures and the log are in {output}; run.json lists all results.")
    altered = 0
    if args.report and not ranks.rank:
        written = write_report(output)
        altered = tell_altered(written)
        if not args.quiet:
            print(f"The report is {written.index}.")
    return max(writer.run.exit_code, altered)


def explain_cases(
    reader: BundleReader,
    cases: Sequence[ScanCase],
    methods: Sequence[Method],
    targets: Sequence[Target] | None,
    output: Path,
    options: Namespace,
    log: RunLog,
    ranks: Processes | None = None,
    heartbeat: Heartbeat | None = None,
    prepare: Callable[[ScanCase], PreparedCase] | None = None,
    places: PlaceChecks | None = None,
) -> ResultWriter:
    """Explain cases one by one; a case that fails is recorded, and the others continue.

    Args:
        targets: the targets; None: every predicted class except background.
        options: options of the command line: device, amp, seed, time_limit, window_batch, network_output, head,
            progress, overwrite, pictures, map_format, layout, override, config, share, yes.
        ranks: the processes that share the work; None: this process alone.
        heartbeat: that of a command which is watched; None: nobody watches.
        prepare: gives a case whose image is already known, as a program that stays open keeps it; None: each case is
            read and preprocessed.
        places: checks of the same cases by an earlier call; None: there are none.

    Returns:
        The writer, whose ``run`` has the status of every result.

    Raises:
        EsegetaError: an option is wrong; no case has been read.
    """
    ranks = ranks or Processes()
    heartbeat = heartbeat or Heartbeat()
    storage.writable_folder(output)
    chosen = bundle_targets(reader) if targets is None else targets
    preprocess = Preprocessor(reader)
    check_layers(reader.network, [*methods, *chosen])
    explainer = explainer_for(reader, options)
    writer = ResultWriter(
        output,
        methods,
        list(chosen),
        provenance=provenance_of(reader, options),
        extension="input" if options.map_format == "input" else ".nii.gz",
        layout=getattr(options, "layout", None),
        dicom=options.map_format == "dicom",
        overwrite=options.overwrite,
        pictures=options.pictures,
        ranks=ranks,
        together=options.share == "windows",
        checks=getattr(options, "checks", True),
        part=part_id(options),
        heartbeat=heartbeat,
        places=places,
        cases=[case.name for case in cases],
    )
    open_log(log, reader, cases, output)
    logger.info("%s: %d case(s), %s", reader.name, len(cases), ", ".join(str(m.name) for m in methods))

    def read(case: ScanCase) -> PreparedCase:
        writes = options.share == "cases" or not ranks.rank
        return prepared_case(reader, preprocess, case, output if writes else None)

    def explain(case: ScanCase) -> None:
        ready = (prepare or read)(case)
        for some, of in ranks.part(options.share, methods, chosen):
            writer.explain(
                explainer,
                ready.image,
                case.name,
                some,
                of,
                scan=ready.scan,
                pipeline=ready.pipeline,
                training_folds=ready.training_folds,
                **ready.given,
            )

    with writer.run:
        finished = heartbeat.finished()
        left = [c for c in cases if c.name not in finished and not writer.run.is_known(c.name, None, None)]
        each_case(ranks.share(left) if options.share == "cases" else left, explain, writer.failed, log, heartbeat)
        writer.run.join(ranks)
        return writer


def prepared_case(reader: BundleReader, preprocess: Preprocessor, case: ScanCase, output: Path | None) -> PreparedCase:
    """Read and preprocess a case.

    Args:
        reader: the bundle.
        preprocess: its preprocessing.
        case: the case.
        output: output folder, for the segmentation of a model whose own code writes one; None: not written.

    Raises:
        InputError: see `Preprocessor`.
    """
    scan, image, data = preprocess(case)
    path = None if output is None else Layout.of(output).beside(case.name, "seg")
    given = reader.case_arguments(image, data, path)
    return PreparedCase(scan, image, given, preprocess.pipeline(case), reader.training_folds(case.name))


def open_log(log: RunLog, reader: BundleReader, cases: Sequence[ScanCase], output: Path) -> None:
    """Open the log file in ``output``; its lines do not show the folders of scans, bundle and output."""
    hide_folders(log, reader, cases)
    log.hide(output, output.name)
    log.write_to(output)


def hide_folders(log: RunLog, reader: BundleReader, cases: Sequence[ScanCase]) -> None:
    """Show only the names of scans and bundle in the log, not their folders."""
    for path in (*(file for case in cases for file in case.files), reader.bundle_dir):
        log.hide(path, path.name)


def each_case(
    cases: Sequence[ScanCase],
    work: Callable[[ScanCase], None],
    failed: Callable[[str, Exception], None],
    log: RunLog,
    heartbeat: Heartbeat | None = None,
    summary: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Process cases one by one; a case that fails is passed to ``failed`` with its error, and the others continue.

    Args:
        heartbeat: that of a command which is watched; None: nobody watches.
        summary: returns what a restarted command must know of the case just finished, JSON-ready.
    """
    heartbeat = heartbeat or Heartbeat()
    for number, case in enumerate(cases, 1):
        with log.of(case.name):
            heartbeat.beat(case.name)
            logger.info("%s: case %d of %d", case.name, number, len(cases))
            try:
                work(case)
            except (RankLost, OutputLost):
                raise
            except Exception as error:  # a bundle's code and networks may raise anything
                failed(case.name, named(error, log))
            heartbeat.finish(case.name, **summary())
    heartbeat.beat(None)


def explainer_for(reader: BundleReader, options: Namespace) -> Explainer:
    """Create the explainer of a bundle from the options of the command line."""
    amp = reader.amp and reader.device.type == "cuda" if options.amp is None else options.amp  # on CPUs as MONAI does
    return Explainer(
        reader.network,
        reader.inferer,
        reader.device,
        amp,
        output=options.network_output,
        class_names=reader.class_names,
        channel_names=[name for _, name in sorted(reader.channel_names.items())],
        window_batch=options.window_batch,
        seed=options.seed,
        progress=options.progress,
        time_limit=options.time_limit,
        allow_costly=getattr(options, "yes", False),
        distributed=getattr(options, "share", "cases") == "windows",
        on_error="record",
        checks=_checks(options),
        head=options.head,
        postprocessing=output_use(reader),
        agreement=getattr(options, "agreement", False),
        local=getattr(options, "local", True),
        layer_axes=layer_axes(options.layer_axes),
        memory_format=getattr(options, "memory_format", None),
    )


def _checks(options: Namespace) -> Checks:
    """Return the explainer's ``checks``; commands without the options check what maps take for granted."""
    checks: bool = getattr(options, "checks", True)
    if not getattr(options, "check_maps", False):
        return checks
    if not checks:
        raise UsageError("--check-maps and --no-checks contradict each other: give one of them")
    return "maps"


def requested(args: Namespace) -> tuple[list[Method], list[Target] | None]:
    """Return the methods and targets that the options name; None in place of targets: those of the bundle.

    Raises:
        UsageError: there is no such method or target, or a parameter is wrong.
    """
    methods = METHODS.create_all(",".join(args.methods or DEFAULT_METHODS))
    return methods, TARGETS.create_all(",".join(targets_of(args))) if args.target else None


def bundle_targets(reader: BundleReader) -> list[Target]:
    """Return the default targets of a bundle, see `esegeta_monai.explain.settings.default_targets`.

    Raises:
        UsageError: the postprocessing, which shows how classes are predicted, cannot be built.
    """
    if reader.metadata.declared != "regression":
        try:
            reader.output_use  # noqa: B018 - raises
        except NetworkError as error:
            raise UsageError(f"{error}; or choose targets by --target, which needs no postprocessing") from error
    return default_targets(reader.metadata.declared)


def output_use(reader: BundleReader) -> Postprocessing:
    """Return the use of the network's output; where the postprocessing cannot be built, that of the metadata."""
    try:
        return reader.output_use
    except NetworkError as error:
        logger.warning("the meaning of the output is determined without the postprocessing: %s", error)
        return Postprocessing(declared=reader.metadata.declared)


def _tell_costs(
    reader: BundleReader,
    cases: Sequence[ScanCase],
    methods: Sequence[Method],
    targets: Sequence[Target] | None,
    options: Namespace,
    log: RunLog,
) -> int:
    """Print the cost of each method; write nothing."""
    hide_folders(log, reader, cases)
    chosen = bundle_targets(reader) if targets is None else targets
    preprocess = Preprocessor(reader)
    check_layers(reader.network, [*methods, *chosen])
    explainer = explainer_for(reader, options)
    costs: list[tuple[str, Cost]] = []
    failures: list[str] = []

    def estimate(case: ScanCase) -> None:
        _, image, data = preprocess(case)
        given = reader.case_arguments(image, data, predict=False)
        costs.extend((case.name, cost) for cost in explainer.costs(image[None], methods, chosen, **given))

    def failed(name: str, error: Exception) -> None:
        failures.append(name)
        logger.error("%s: %s", name, error)

    each_case(cases, estimate, failed, log)
    print("\n".join(table(costs)))
    seconds = sum(cost.seconds or 0.0 for _, cost in costs)
    print(
        f"About {duration(seconds)} in total; less for methods that share passes (gradients, CAM). Nothing was written."
    )
    return int(bool(failures))


def named(error: Exception, log: RunLog) -> Exception:
    """Return the error as ``run.json`` records it: its cause in one line, without folders."""
    if isinstance(error, EsegetaError):
        named: Exception = type(error)(log.clean(str(error)))
    elif out_of_memory(error):
        named = NetworkError("out of memory: use a smaller --window-batch, a smaller window, or --device cpu")
    else:
        named = NetworkError(log.clean(f"the network or its inferer failed on this case: {reason(error)}"))
    named.__cause__ = error
    return named


def provenance_of(reader: BundleReader, options: Namespace) -> dict[str, Any]:
    provenance = {**reader.provenance, "weights_sha256": weights_hash(unwrap(reader.network))}
    if options.config:
        provenance["configs_used_sha256"] = {file.name: storage.sha256_file(file) for file in reader.config_files}
    if options.override:
        provenance["overrides"] = overrides(options.override)
    return provenance
