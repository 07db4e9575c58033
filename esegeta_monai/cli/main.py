"""The command line: ``esegeta-monai COMMAND`` or ``python -m esegeta_monai COMMAND``.

Exit codes: 0 all done (empty targets included), 1 some case or method failed, 2 a usage error: nothing was computed,
130 stopped by Ctrl-C. An error is one line, ``esegeta-monai: error: what, where, what to do``; ``-v`` adds the
traceback.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from esegeta_monai.cli.log import RunLog, reason
from esegeta_monai.errors import EsegetaError
from esegeta_monai.utils.files import INTENDED_USE

__all__ = ["build_parser", "main"]

DONE, FAILED, USAGE, STOPPED = 0, 1, 2, 130

EXAMPLES = """examples:
  esegeta-monai demo
  esegeta-monai explain --bundle my_bundle --input scans/ --output explained/
  esegeta-monai explain --bundle my_bundle --input a.nii.gz --output explained/ \\
      --methods "Saliency,IntegratedGradients(tolerance=1e-3)" --target "MultiClassMask(class_index=1)"
  esegeta-monai report explained/
  esegeta-monai evaluate --bundle my_bundle --input scans/ --maps explained/ --output judged/ --label labels/
  esegeta-monai methods
  esegeta-monai layers --bundle my_bundle
"""

EXPLAIN = """Explains what a bundle predicts on your scans. For each case, target and method it writes
OUTPUT/CASE/CASE_TARGET_METHOD_attr.nii.gz (the map, on the scan's own voxels), .png (a picture) and .json (the record),
and OUTPUT/run.json with the status of everything. What is finished already is skipped, so the same command goes on
where an earlier run was stopped. The bundle itself is not changed."""

EVALUATE = """Measures how far maps can be trusted: does the target change as they say, do they stay the same when they
should, do they change when the network does, do they lie where the cause is known to lie. Beside the methods stand
three control maps that do not look at the network (random, edges of the image, constant); a method that is no better is
named. It writes OUTPUT/metrics.csv (one row a case, target, method and metric), OUTPUT/CASE/CASE_metrics.json (with
curves and parameters) and OUTPUT/CASE/CASE_regions.csv (sums of the map per region, channel and distance)."""

EVALUATE_END = """labels:
  A label says where the cause lies. It is needed by the metrics of localisation (pointing game, relevance mass, ...)
  and may lie on any grid. A folder must hold one file for each case: CASE.nii.gz, or one whose name begins with CASE_.

exit codes: 0 all done (metrics that say nothing about a map, or do not apply to it, included), 1 something failed,
2 usage error
"""

EXPLAIN_END = """inputs:
  scan.nii.gz                a scan; the case is called "scan"
  scans/                     every scan in the folder and below it, sorted
  t1.nii.gz,t2.nii.gz        one case whose channels are in several files, in the network's order
  patients/                  a folder with one file for each channel of the network, named after the channels in
                             metadata.json (p1/p1_T1c.nii.gz, p1/p1_FLAIR.nii.gz, ...) is one case
  p7=scan.nii.gz             the case is called "p7"

exit codes: 0 all done, 1 some case or method failed (run.json says why; the others are there), 2 usage error
"""

REPORT = """Writes OUTPUT/CASE/CASE_report.html for each case and OUTPUT/index.html, from what 'explain' and, where it
was run, 'evaluate' left in OUTPUT; also after a run that failed or was stopped. Each page is complete in itself and
opens in a browser without a network. It names the cases as you called them, and no folder and no scan file."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like all others."""

    def error(self, message: str) -> NoReturn:
        _say(f"{message} ('{self.prog} --help' explains)")
        raise SystemExit(USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the words behind ``esegeta-monai``; None: those of the process.

    Returns:
        The exit code: 0, 1, 2 or 130.

    >>> main(["overlay"])
    2
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, a wrong option
        return int(stop.code or 0)
    try:
        with RunLog(_level(args)) as log:
            return args.run(args, log)
    except EsegetaError as error:
        _say(str(error), _if(args, error))
        return USAGE
    except KeyboardInterrupt:
        _say("stopped; finished maps stay, and the same command goes on from there")
        return STOPPED
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        sys.stderr.close()
        return DONE
    except Exception as error:  # not foreseen: still one line, and the traceback for whoever asks
        _say(f"{reason(error)}; run it with -v for the traceback, which helps to report this", _if(args, error))
        return FAILED


def _if(args: argparse.Namespace, error: Exception) -> Exception | None:
    return error if args.verbose else None


def _say(text: str, error: Exception | None = None) -> None:
    if error is not None:
        traceback.print_exception(error)
    print(f"esegeta-monai: error: {' '.join(text.split())}", file=sys.stderr)


def _level(args: argparse.Namespace) -> str:
    if getattr(args, "log_level", None):
        return args.log_level
    return "DEBUG" if args.verbose else "ERROR" if args.quiet else "INFO"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="esegeta-monai",
        description="See what a medical image network looks at: exact whole-volume explanation of MONAI bundles.",
        epilog=f"{EXAMPLES}\n{INTENDED_USE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and stop")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_explain(commands)
    report = _add(commands, "report", "write an HTML report of what was explained", _lazy("report", "run"))
    report.description = REPORT
    report.add_argument("output", metavar="OUTPUT", help="the output folder of 'explain'")
    report.add_argument(
        "--neurological", action="store_true", help="patient's left on the viewer's left (default: radiological)"
    )
    report.add_argument(
        "--view-3d",
        action="store_true",
        help="add a 3D view (needs NiiVue, which nilearn carries; 2.3 MB a page); a head can be recognised by its face",
    )
    _add_evaluate(commands)
    _add_demo(commands)
    kinds = {"methods": "how it can be explained", "targets": "what can be explained", "metrics": "how maps are judged"}
    for name, what in kinds.items():
        table = _add(commands, name, f"list {what}, with parameters and defaults", _lazy("tables", f"run_{name}"))
        table.add_argument("name", nargs="?", metavar="NAME", help="tell all about this one")
        table.add_argument("--bundle", metavar="DIR", help="also those in this bundle's scripts/")
        table.add_argument("--json", action="store_true", help="as JSON, for programs")
    layers = _add(
        commands, "layers", "list a bundle's layers, for --methods 'GradCam(layer=NAME)'", _lazy("look", "run_layers")
    )
    _add_bundle(layers, required=True)
    layers.add_argument("--input", metavar="FILE", help="a scan to try the network on (default: noise of one window)")
    _add_network(layers)
    layers.add_argument("--json", action="store_true", help="as JSON, for programs")
    info = _add(commands, "info", "show versions, devices, and what a bundle holds", _lazy("look", "run_info"))
    _add_bundle(info, required=False)
    info.add_argument("--json", action="store_true", help="as JSON, for programs")
    _add_patterns(commands)
    overlay = _add(
        commands,
        "overlay",
        "write the config file that lets 'monai.bundle run' explain a bundle, and say what was found in it",
        _lazy("overlay", "run"),
    )
    _add_bundle(overlay, required=False)
    overlay.add_argument("--output", metavar="FILE", help="where to write it (default: explain.json in DIR/configs)")
    overlay.add_argument(
        "--multi-gpu", action="store_true", help="write multi_gpu_explain.json beside it, for several processes"
    )
    overlay.add_argument(
        "--metrics",
        action="store_true",
        help="write explain_metrics.json, which judges the maps as 'evaluate' does; alone or behind explain.json",
    )
    overlay.add_argument("--path", action="store_true", help="write nothing, print where the shipped file lies")
    merge = _add(
        commands, "merge", "write a bundle's config and its overlay as one file", _lazy("overlay", "run_merge")
    )
    _add_bundle(merge, required=True)
    merge.add_argument(
        "--add",
        action="append",
        metavar="FILE",
        help="what is merged behind the config (default: the overlay that fits); may be repeated",
    )
    merge.add_argument("--output", required=True, metavar="FILE", help="where to write it; never over another file")
    return parser


def _add_explain(commands: Any) -> None:
    explain = _add(commands, "explain", "explain a bundle's predictions on your scans", _lazy("explain", "run"))
    explain.description, explain.epilog = EXPLAIN, EXPLAIN_END
    _add_bundle(explain, required=True)
    explain.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans: see below")
    explain.add_argument("--output", required=True, metavar="DIR", help="where the results go; made if missing")
    explain.add_argument(
        "--methods",
        action="append",
        metavar="LIST",
        help="how: names with commas between them, with parameters in brackets (default: Saliency,GradCam; "
        "'esegeta-monai methods' lists all)",
    )
    explain.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help='what: such as "MultiClassMask(class_index=1)" or "MultiClassMask(\'spleen\')"; may be repeated '
        "(default: every predicted class but background; 'esegeta-monai targets' lists all)",
    )
    explain.add_argument("--report", action="store_true", help="write the HTML report when all is done")
    _add_network(explain)
    explain.add_argument(
        "--dry-run",
        action="store_true",
        help="write nothing; print window passes, time and memory of every method for every target of every case",
    )
    _add_run_options(explain)
    _add_share(explain)


def _add_evaluate(commands: Any) -> None:
    evaluate = _add(
        commands, "evaluate", "measure how far the maps of a bundle can be trusted", _lazy("evaluate", "run")
    )
    evaluate.description, evaluate.epilog = EVALUATE, EVALUATE_END
    _add_bundle(evaluate, required=True)
    evaluate.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans, as for 'explain'")
    evaluate.add_argument("--output", required=True, metavar="DIR", help="where the tables go; made if missing")
    evaluate.add_argument(
        "--maps", metavar="DIR", help="judge the maps in this output folder of 'explain' in place of computing them"
    )
    evaluate.add_argument(
        "--methods",
        action="append",
        metavar="LIST",
        help="how it is explained (default: those of --maps, else Saliency,GradCam)",
    )
    evaluate.add_argument(
        "--target",
        action="append",
        metavar="TARGET",
        help="what is explained (default: those of --maps, else every predicted class but background)",
    )
    evaluate.add_argument(
        "--metrics",
        action="append",
        metavar="LIST",
        help="names with commas between them, with parameters in brackets, or 'all' (default: a quick selection; "
        "'esegeta-monai metrics' lists all)",
    )
    evaluate.add_argument(
        "--label", metavar="FILE", help="label map, or folder of them named like the cases: see below"
    )
    evaluate.add_argument(
        "--label-value",
        type=_label_value,
        metavar="N",
        help="which value of the label is the cause: a number, or 'class' for the target's own (default: all above 0)",
    )
    evaluate.add_argument(
        "--regions", metavar="FILE", help="label map, or folder, for the region tables (default: --label)"
    )
    evaluate.add_argument("--region-names", metavar="N=NAME,...", help="names of its values, such as 1=liver,2=spleen")
    evaluate.add_argument(
        "--body", metavar="FILE", help="mask of the patient, or folder (default: the image's foreground)"
    )
    evaluate.add_argument(
        "--outside-alarm", type=_share, default=0.1, metavar="SHARE",
        help="a region table raises its alarm where more than this share lies outside the body (default: %(default)s)",
    )  # fmt: skip
    evaluate.add_argument(
        "--no-controls",
        dest="controls",
        action="store_false",
        help="without the control maps (random, Sobel, constant)",
    )
    _add_network(evaluate)
    _add_computing_options(evaluate)
    _add_share(evaluate)


def _add_share(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share",
        choices=["cases", "windows", "methods"],
        default="cases",
        help="what the processes share, where torchrun started several: each takes cases of its own (default), all "
        "compute each case together window by window (one large scan), or each takes methods and targets of its own",
    )


def _add_demo(commands: Any) -> None:
    demo = _add(commands, "demo", "explain a brain segmentation, to see what comes out", _lazy("demo", "run"))
    demo.add_argument(
        "--output", default="demo_output", metavar="DIR", help="where the results go (default: %(default)s)"
    )
    demo.add_argument("--bundle", metavar="DIR", help="the bundle brain_tissue_segmentation, where it is not found")
    demo.add_argument("--methods", action="append", metavar="LIST", help="other methods than those chosen for the demo")
    demo.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    _add_run_options(demo)
    demo.set_defaults(config=None, override=None, network_output=None, share="cases")


def _add_patterns(commands: Any) -> None:
    patterns = _add(
        commands,
        "patterns",
        "fit the patterns of PatternNet and PatternAttribution on scans",
        _lazy("patterns", "run"),
    )
    _add_bundle(patterns, required=True)
    patterns.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="scans, as for 'explain'")
    patterns.add_argument("--output", metavar="FILE", help="where they go (default: models/patterns.pt in the bundle)")
    patterns.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    _add_network(patterns)


def _add(commands: Any, name: str, summary: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    loud.add_argument("-v", "--verbose", action="store_true", help="say more, with tracebacks of errors")
    return parser


def _add_bundle(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--bundle", required=required, metavar="DIR", help="the MONAI bundle: the folder with configs/")
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="the bundle's config (default: configs/inference.json); several are merged in order",
    )
    parser.add_argument(
        "--override",
        action="append",
        metavar="ID=VALUE",
        help="another value for an id of the config, such as inferer#overlap=0.25; may be repeated",
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    parser.add_argument(
        "--network-output",
        type=lambda text: int(text) if text.lstrip("-").isdigit() else text,
        metavar="KEY",
        help="which output to explain, where the network has several (number or key)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_computing_options(parser)
    parser.add_argument(
        "--map-format",
        choices=["nifti", "input"],
        default="nifti",
        help="how maps are written: NIfTI, or NRRD and MHA where the scan is (needs ITK; others stay NIfTI)",
    )
    parser.add_argument(
        "--yes", action="store_true", help="compute also what is refused for its cost, such as an occluder of one voxel"
    )
    parser.add_argument("--overwrite", action="store_true", help="compute again what is finished")
    parser.add_argument(
        "--no-pictures",
        dest="pictures",
        action="store_false",
        help="write no PNG files, and no copy of the scan for the report",
    )


def _add_computing_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="mixed precision (default: on CUDA as the bundle says, off on the CPU)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all random numbers (default: 0)")
    parser.add_argument(
        "--time-limit", type=_positive, metavar="SECONDS", help="for one method on one case; then the next one begins"
    )
    parser.add_argument(
        "--window-batch", type=_count, metavar="N", help="windows computed at once (default: as the bundle's inferer)"
    )
    parser.add_argument(
        "--no-progress", dest="progress", action="store_false", default=sys.stderr.isatty(), help="show no progress bar"
    )
    parser.add_argument(
        "--log-level",
        choices=["DEBUG", "INFO", "WARNING", "ERROR"],
        type=str.upper,
        help="what the log says, on the console and in OUTPUT/esegeta.log",
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _label_value(text: str) -> int | str:
    if text != "class" and (not text.isdigit() or int(text) < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0, and not 'class'")
    return text if text == "class" else int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import esegeta_monai

        print(f"esegeta-monai {esegeta_monai.__version__}")
        parser.exit()


def _lazy(module: str, function: str) -> Callable[..., int]:
    """A command's function; its module is imported when it runs."""

    def run(args: argparse.Namespace, log: RunLog) -> int:
        from importlib import import_module

        return getattr(import_module(f"esegeta_monai.cli.{module}"), function)(args, log)

    return run


if __name__ == "__main__":
    sys.exit(main())
