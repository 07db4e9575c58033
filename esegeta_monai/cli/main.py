"""The command line: ``esegeta-monai COMMAND`` or ``python -m esegeta_monai COMMAND``.

Exit codes: 0 all done (including empty targets), 1 some case or method failed, 2 usage error (nothing was computed),
3 the bundle is not trusted (nothing of it has run), 128 + N stopped by signal N: 130 by Ctrl-C, 143 by SIGTERM, 129 by
SIGHUP. An error is printed in one line, ``esegeta-monai: error: file or option: cause: remedy``; ``-v`` adds the
traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from esegeta_monai.cli import parsers, watch
from esegeta_monai.cli.log import RunLog, open_missing_streams, print_every_character, reason
from esegeta_monai.errors import EsegetaError, OutputLost, RankLost, TrustError
from esegeta_monai.utils.files import INTENDED_USE, refuse_remote
from esegeta_monai.utils.heartbeat import Heartbeat
from esegeta_monai.utils.names import one_line

__all__ = ["build_parser", "main"]

DONE, FAILED, USAGE, UNTRUSTED = 0, 1, 2, 3
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
"""Signals that stop a run; the last one does not exist on Windows."""

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


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name, summary: as ``--help`` shows them.
        add_arguments: function that adds its options, from a module that is imported at once.
        function: module of this package and function that run it; the module is imported when it runs.
    """

    name: str
    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    function: str

    def run(self, args: argparse.Namespace, log: RunLog) -> int:
        """Import the command and run it."""
        module, _, function = self.function.partition(":")
        run: Callable[..., int] = getattr(importlib.import_module(f"esegeta_monai.cli.{module}"), function)
        return run(args, log)


COMMANDS = (
    Command("explain", "explain a bundle's predictions on your scans", parsers.add_explain, "explain:run"),
    Command("report", "write an HTML report of the maps", parsers.add_report, "report:run"),
    Command("evaluate", "evaluate the maps of a bundle by metrics", parsers.add_evaluate, "evaluate:run"),
    Command(
        "concepts",
        "list a layer's most relevant channels over scans, with regions that show them",
        parsers.add_concepts,
        "concepts:run",
    ),
    Command(
        "influence",
        "list the training cases that raised or lowered a prediction",
        parsers.add_influence,
        "influence:run",
    ),
    Command(
        "cohort",
        "analyse the maps of several cases together: regions, clusters, groups, common space",
        parsers.add_cohort,
        "cohort:run",
    ),
    Command("merge-runs", "join the parts of a run", parsers.add_merge_runs, "merge_runs:run"),
    Command("app", "open a page on which a click on a voxel asks the network why", parsers.add_app, "app:run"),
    Command("demo", "compare a network that uses a shortcut with one that does not", parsers.add_demo, "demo:run"),
    Command(
        "methods",
        "list the explanation methods, with parameters and defaults",
        parsers.add_table,
        "tables:run_methods",
    ),
    Command("targets", "list the targets, with parameters and defaults", parsers.add_table, "tables:run_targets"),
    Command(
        "metrics", "list the metrics for maps, with parameters and defaults", parsers.add_table, "tables:run_metrics"
    ),
    Command(
        "layers", "list a bundle's layers, for --methods 'GradCam(layer=NAME)'", parsers.add_layers, "look:run_layers"
    ),
    Command("check", "check what maps take for granted about a bundle and a scan", parsers.add_check, "check:run"),
    Command("info", "show versions, devices and the contents of a bundle", parsers.add_info, "look:run_info"),
    Command(
        "patterns",
        "fit the patterns of PatternNet and PatternAttribution on scans",
        parsers.add_patterns,
        "patterns:run",
    ),
    Command(
        "overlay",
        "write the config file with which 'monai.bundle run' explains a bundle",
        parsers.add_overlay,
        "overlay:run",
    ),
    Command(
        "import-esegeta",
        "turn a configuration of TorchEsegeta into a bundle's overlay",
        parsers.add_import_esegeta,
        "import_esegeta:run",
    ),
    Command("merge", "merge a bundle's config and its overlay into one file", parsers.add_merge, "overlay:run_merge"),
)
"""The commands. ``--help`` and errors of usage come at once, since torch and MONAI are imported by a command's run."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*?)'", message)
        if wrong:
            message = f"there is no command {wrong[1]!r}{_meant(wrong[1], [command.name for command in COMMANDS])}"
        _say(f"{message} (see '{self.prog} --help')")
        raise SystemExit(USAGE)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; a misspelled option is named before argparse misses the required one that it was meant to be."""
        for text in sys.argv[1:] if args is None else args:
            option = text.partition("=")[0]
            if text == "--" or (self._subparsers is not None and not text.startswith("-")):
                break  # what follows a command is parsed by the command
            known = [name for name in self._option_string_actions if name.startswith("--")]
            if option.startswith("--") and not any(name.startswith(option) for name in known):
                meant = _meant(option, known)
                if not meant and self._subparsers is not None:
                    self.error(f"there is no option {option} before the command: write '{self.prog} COMMAND {option}'")
                self.error(f"there is no option {option}{meant}")
        return super().parse_known_args(args, namespace)


def _meant(text: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(text, known, n=2, cutoff=0.7)
    return f": did you mean {' or '.join(near)}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after ``esegeta-monai``; None: those of the process.

    Returns:
        The exit code: 0, 1, 2, 3, or 128 + N for signal N.

    >>> main(["overlay"])
    2
    """
    open_missing_streams()
    print_every_character()
    try:
        os.getcwd()
    except FileNotFoundError:  # MKL would end the program with a message of its own
        _say("the working folder was removed: change to another one")
        return USAGE
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, a wrong option
        return int(stop.code or 0)
    limit = getattr(args, "hard_time_limit", None)
    args.heartbeat = Heartbeat.take()
    if limit is not None and args.heartbeat.folder is None:
        return watched(limit, argv)
    try:
        _refuse_remote_paths(args)
        with _stoppable(), RunLog(_level(args)) as log:
            return args.run(args, log)
    except (OutputLost, RankLost) as error:
        _say(str(error), _if(args, error))
        return FAILED
    except EsegetaError as error:
        _say(str(error), _if(args, error))
        return UNTRUSTED if isinstance(error, TrustError) else USAGE
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, _Stopped) else signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {number.name}"
        _say(f"stopped{by}; finished maps are kept, and the same command resumes the run")
        return 128 + number
    except BrokenPipeError:  # the reader of our output (head, less) has closed the pipe
        sys.stderr.close()
        return DONE
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of our files there are errors of ours
        _say(
            f"the standard output cannot be written: {error.strerror}" if full else _unexpected(error), _if(args, error)
        )
        return FAILED
    except Exception as error:  # unexpected: still one line; -v adds the traceback
        _say(_unexpected(error), _if(args, error))
        return FAILED


def _unexpected(error: Exception) -> str:
    return f"{reason(error)}; unexpected error: please report it with the traceback, which -v prints"


def watched(limit: float, argv: Sequence[str] | None) -> int:
    """Run a command in a child that `esegeta_monai.cli.watch` watches, and return its exit code.

    A command of its own becomes the watching process, without what it has imported; a call from Python stays.

    Args:
        limit: seconds for one result.
        argv: as in `main`.
    """
    if os.name == "nt":
        _say("--hard-time-limit needs process groups, which Windows does not have: use --time-limit")
        return USAGE
    if argv is not None:
        return watch.watch(limit, [sys.executable, "-m", "esegeta_monai", *argv])
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, *sys.orig_argv[1:]]
    os.execv(sys.executable, [sys.executable, "-I", watch.__file__, str(limit), *command])


class _Stopped(KeyboardInterrupt):
    """Raised by a signal that stops the run: what handles Ctrl-C handles the other signals too."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _stoppable() -> Iterator[None]:
    """Raise `_Stopped` inside the block when a signal asks to stop; signals that are ignored (``nohup``) stay so."""

    def stop(number: int, _: Any) -> NoReturn:
        raise _Stopped(signal.Signals(number))

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in STOPPING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    for command in COMMANDS:
        _add(commands, command)
    return parser


def _add(commands: Any, command: Command) -> None:
    parser = commands.add_parser(
        command.name,
        help=command.summary,
        description=command.summary[0].upper() + command.summary[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=command.run)
    loud = parser.add_mutually_exclusive_group()
    loud.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    loud.add_argument("-v", "--verbose", action="store_true", help="print debug messages and the tracebacks of errors")
    command.add_arguments(parser)


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import esegeta_monai

        print(f"esegeta-monai {esegeta_monai.__version__}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
