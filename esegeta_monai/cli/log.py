"""The log of a run, on the console and in a file: one line per message, with the rank and without patient data.

The names of files and folders may be those of people. Every path registered by `RunLog.hide` is replaced before a
line is written, also in tracebacks; only the name of the case remains.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from esegeta_monai.utils.files import refuse_special
from esegeta_monai.utils.names import one_line

__all__ = ["LOG_FILE", "RunLog", "open_missing_streams", "print_every_character", "reason"]

LOG_FILE = "esegeta.log"


def print_every_character() -> None:
    """Let standard output and error accept every character, whatever the locale is.

    In a container without a locale Python may encode them as ASCII, and a formula or the name of a scan would end the
    program. Characters that the encoding cannot express are then printed as an escape such as ``\\u03a3``; an ASCII
    stream becomes UTF-8, as Python itself does in the C locale (PEP 540).
    """
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):  # replaced by a notebook or by the program that calls us
            continue
        ascii_only = codecs.lookup(stream.encoding).name == "ascii"
        stream.reconfigure(encoding="utf-8" if ascii_only else None, errors="backslashreplace")


def open_missing_streams() -> None:
    """Open the null device in place of standard streams that the caller has closed (``2>&-``, some daemons).

    Python then has None for them, and the system would give their numbers to the next files: what a library prints
    would be written into a map.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


class RunLog:
    """The handlers of one run on the package's logger; a context manager that removes them at the end.

    Args:
        level: level of the console, a name of the `logging` module; the level of the file is INFO or lower.

    >>> log = RunLog("INFO")
    >>> log.hide("/scans/Doe_Jane/t1.nii.gz", "t1.nii.gz")
    >>> log.clean("/scans/Doe_Jane/t1.nii.gz: the file is empty")
    't1.nii.gz: the file is empty'
    """

    def __init__(self, level: str = "INFO") -> None:
        self.level: int = logging.getLevelName(level)
        self.logger = logging.getLogger("esegeta_monai")
        self.case: str | None = None
        self._hidden: dict[str, str] = {}
        self._handlers: list[logging.Handler] = []
        self._before = self.logger.level

    def __enter__(self) -> RunLog:
        self._add(_Console(), self.level)
        return self

    def __exit__(self, *_: object) -> None:
        for handler in self._handlers:
            self.logger.removeHandler(handler)
            handler.close()
        self._handlers.clear()
        self.logger.setLevel(self._before)

    def write_to(self, folder: Path) -> None:
        """Also append to ``folder/esegeta.log``; if that cannot be written, warn, and log to the console alone."""
        try:
            refuse_special(folder / LOG_FILE)
            handler = logging.FileHandler(folder / LOG_FILE, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            self.logger.warning("%s cannot be written (%s): the log is on the console only", LOG_FILE, error.strerror)
            return
        self._add(handler, min(self.level, logging.INFO))

    def _add(self, handler: logging.Handler, level: int) -> None:
        handler.setLevel(level)
        handler.setFormatter(_Formatter(self))
        self._handlers.append(handler)
        self.logger.addHandler(handler)
        self.logger.setLevel(min(h.level for h in self._handlers))

    def hide(self, path: str | os.PathLike[str], name: str) -> None:
        """Replace ``path``, as given or absolute, by ``name`` in all following messages."""
        for text in {str(path), os.path.abspath(path), os.path.realpath(path)} - {".", "/"}:
            for form in {text, " ".join(text.split()), one_line(text)}:  # as messages show it
                self._hidden[form] = one_line(name)

    def clean(self, text: str) -> str:
        """Replace all hidden paths in ``text``, the longest first."""
        for path in sorted(self._hidden, key=len, reverse=True):
            text = text.replace(path, self._hidden[path])
        return text

    @contextmanager
    def of(self, case: str) -> Iterator[None]:
        """Replace the number of a case in a batch by its name in the messages of this block."""
        self.case = one_line(case)
        try:
            yield
        finally:
            self.case = None


class _Formatter(logging.Formatter):
    def __init__(self, log: RunLog) -> None:
        who = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # unset for a single process
        super().__init__(f"%(asctime)s %(levelname)s{who}: %(message)s", "%Y-%m-%d %H:%M:%S")
        self.log = log

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        record.message = " ".join(one_line(record.message).split())
        if self.log.case is not None:
            record.message = re.sub(r"^case \d+(?=:)", lambda _: self.log.case or "", record.message)
        return super().formatMessage(record)

    def formatException(self, info: Any) -> str:  # noqa: N802 - logging's own name
        """Indent the traceback: texts in it may have line breaks, and no line of it may look like one of the log."""
        return "\n".join(f"    {line}" for line in super().formatException(info).splitlines())

    def format(self, record: logging.LogRecord) -> str:
        record.exc_text = None  # another handler's formatter may have left its own
        return self.log.clean(super().format(record))


class _Console(logging.Handler):
    """A handler that writes to standard error, above a progress bar if one is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        try:
            tqdm.write(text, file=sys.stderr)
        except OSError:  # such as a full disk behind ``2> file``: the log file has the line, and the work goes on
            self.handleError(record)


def reason(error: BaseException) -> str:
    """Return the innermost cause in one line; MONAI wraps the original error in others that name the transform.

    >>> reason(ValueError("no such axis\\n  details"))
    'ValueError: no such axis'
    """
    while error.__cause__ is not None:
        error = error.__cause__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__
