"""The command line: ``esegeta-monai COMMAND`` or ``python -m esegeta_monai COMMAND``.

Exit codes: 0 all done (including empty targets), 1 some case or method failed, 2 usage error (nothing was computed),
3 the bundle is not trusted (nothing of it has run), 130 stopped by Ctrl-C. An error is printed in one line,
``esegeta-monai: error: file or option: cause: remedy``; ``-v`` adds the traceback.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from esegeta_monai.cli import check, concepts, demo, evaluate, explain, look, overlay, patterns, report, tables
from esegeta_monai.cli.log import RunLog, reason
from esegeta_monai.errors import EsegetaError, TrustError
from esegeta_monai.utils.files import INTENDED_USE, refuse_remote
from esegeta_monai.utils.names import one_line

__all__ = ["build_parser", "main"]

DONE, FAILED, USAGE, UNTRUSTED, STOPPED = 0, 1, 2, 3, 130

EXAMPLES = """examples:
  esegeta-monai demo
  esegeta-monai explain --bundle my_bundle --input scans/ --output explained/
  esegeta-monai explain --bundle my_bundle --input a.nii.gz --output explained/ \\
      --methods "Saliency,IntegratedGradients(tolerance=1e-3)" --target "MultiClassMask(class_index=1)"
  esegeta-monai report explained/
  esegeta-monai evaluate --bundle my_bundle --input scans/ --maps explained/ --output evaluated/ --label labels/
  esegeta-monai methods
  esegeta-monai layers --bundle my_bundle
"""


COMMANDS: tuple[tuple[str, str, Callable[..., None], Callable[..., int]], ...] = (
    ("explain", "explain a bundle's predictions on your scans", explain.add_arguments, explain.run),
    ("report", "write an HTML report of the maps", report.add_arguments, report.run),
    ("evaluate", "evaluate the maps of a bundle by metrics", evaluate.add_arguments, evaluate.run),
    (
        "concepts",
        "list a layer's most relevant channels over scans, with regions that show them",
        concepts.add_arguments,
        concepts.run,
    ),
    ("demo", "explain a brain segmentation as a demonstration", demo.add_arguments, demo.run),
    (
        "methods",
        "list the explanation methods, with parameters and defaults",
        tables.add_arguments,
        tables.run_methods,
    ),
    ("targets", "list the targets, with parameters and defaults", tables.add_arguments, tables.run_targets),
    ("metrics", "list the metrics for maps, with parameters and defaults", tables.add_arguments, tables.run_metrics),
    (
        "layers",
        "list a bundle's layers, for --methods 'GradCam(layer=NAME)'",
        look.add_layers_arguments,
        look.run_layers,
    ),
    (
        "check",
        "check what maps take for granted about a bundle and a scan",
        check.add_arguments,
        check.run,
    ),
    ("info", "show versions, devices and the contents of a bundle", look.add_info_arguments, look.run_info),
    (
        "patterns",
        "fit the patterns of PatternNet and PatternAttribution on scans",
        patterns.add_arguments,
        patterns.run,
    ),
    (
        "overlay",
        "write the config file with which 'monai.bundle run' explains a bundle",
        overlay.add_arguments,
        overlay.run,
    ),
    ("merge", "merge a bundle's config and its overlay into one file", overlay.add_merge_arguments, overlay.run_merge),
)
"""Name, summary, arguments and function of each command. Their modules add little to the start-up time."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        _say(f"{message} (see '{self.prog} --help')")
        raise SystemExit(USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after ``esegeta-monai``; None: those of the process.

    Returns:
        The exit code: 0, 1, 2, 3 or 130.

    >>> main(["overlay"])
    2
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, a wrong option
        return int(stop.code or 0)
    try:
        _refuse_remote_paths(args)
        with RunLog(_level(args)) as log:
            return args.run(args, log)
    except EsegetaError as error:
        _say(str(error), _if(args, error))
        return UNTRUSTED if isinstance(error, TrustError) else USAGE
    except KeyboardInterrupt:
        _say("stopped; finished maps are kept, and the same command resumes the run")
        return STOPPED
    except BrokenPipeError:  # the reader of our output (head, less) has closed the pipe
        sys.stderr.close()
        return DONE
    except Exception as error:  # unexpected: still one line; -v adds the traceback
        _say(
            f"{reason(error)}; unexpected error: please report it with the traceback, which -v prints", _if(args, error)
        )
        return FAILED


def _refuse_remote_paths(args: argparse.Namespace) -> None:
    """Refuse remote paths in any option before any work: no other value begins like a URL."""
    for name, given in vars(args).items():
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, str):
                refuse_remote(value, f"{name.replace('_', '-')}: ")


def _if(args: argparse.Namespace, error: Exception) -> Exception | None:
    return error if args.verbose else None


def _say(text: str, error: Exception | None = None) -> None:
    if error is not None:
        traceback.print_exception(error)
    print(f"esegeta-monai: error: {' '.join(one_line(text).split())}", file=sys.stderr)


def _level(args: argparse.Namespace) -> str:
    if getattr(args, "log_level", None):
        return args.log_level
    return "DEBUG" if args.verbose else "ERROR" if args.quiet else "INFO"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="esegeta-monai",
        description="Explain the predictions of medical image networks: exact whole-volume maps for MONAI bundles.",
        epilog=f"{EXAMPLES}\n{INTENDED_USE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary, add_arguments, run in COMMANDS:
        _add(commands, name, summary, add_arguments, run)
    return parser


def _add(commands: Any, name: str, summary: str, add_arguments: Callable[..., None], run: Callable[..., int]) -> None:
    parser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    loud.add_argument("-v", "--verbose", action="store_true", help="print debug messages and the tracebacks of errors")
    add_arguments(parser)


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import esegeta_monai

        print(f"esegeta-monai {esegeta_monai.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
