"""Progress of a run: window passes, progress bar, time limit, warnings."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from esegeta_monai.errors import MethodTimeout

__all__ = ["Progress", "RunObserver", "observed", "observer"]

logger = logging.getLogger("esegeta_monai")


class RunObserver:
    """Follows the passes of all methods that run inside `observed`, and can stop them; this one does nothing."""

    def began(self, names: str, windows: int | None) -> None:
        """Note that methods begin.

        Args:
            names: the methods.
            windows: window passes that they will take; None: unknown.
        """

    def passed(self, windows: int) -> None:
        """Note that windows went through the network."""

    def check(self) -> None:
        """Called before each batch of windows; an exception ends the run. Methods handle an `Exception` as their own
        failure, so raise another `BaseException`."""


_OBSERVER: ContextVar[RunObserver | None] = ContextVar("observer", default=None)


@contextmanager
def observed(observer: RunObserver) -> Iterator[None]:
    """Let ``observer`` follow everything that runs in this thread inside the block.

    >>> class Counter(RunObserver):
    ...     windows = 0
    ...     def passed(self, windows):
    ...         self.windows += windows
    >>> counter = Counter()
    >>> with observed(counter):
    ...     Progress().passed(3)
    >>> counter.windows
    3
    """
    token = _OBSERVER.set(observer)
    try:
        yield
    finally:
        _OBSERVER.reset(token)


def observer() -> RunObserver | None:
    """Return the observer of the innermost `observed`, if there is one."""
    return _OBSERVER.get()


class Progress:
    """Counts window passes, keeps the time limit of the running method and collects warnings.

    Args:
        on_pass: called with the number of windows after each forward pass, for a progress bar.
        silent: collect warnings without logging them.

    Attributes:
        passes: windows that went through the network since `start`.
        warnings: texts in the order in which they were given.
    """

    def __init__(self, on_pass: Callable[[int], None] | None = None, *, silent: bool = False) -> None:
        self.on_pass, self.silent = on_pass, silent
        self.passes = 0
        self.warnings: list[str] = []
        self._labels: dict[str, str | None] = {}
        self._deadline: float | None = None
        self._limit = 0.0
        self._pass_limit: int | None = None

    def start(self, time_limit: float | None = None, pass_limit: int | None = None) -> None:
        """Set all counters to zero.

        Args:
            time_limit: seconds from now; None: no limit.
            pass_limit: window passes after which the method is stopped; None: no limit.
        """
        self._pass_limit = pass_limit
        self.passes, self.warnings, self._labels, self._limit = 0, [], {}, time_limit or 0.0
        self._deadline = None if time_limit is None else time.monotonic() + time_limit

    def passed(self, windows: int) -> None:
        """Count windows that went through the network."""
        self.passes += windows
        if self.on_pass is not None:
            self.on_pass(windows)
        if (follows := _OBSERVER.get()) is not None:
            follows.passed(windows)

    def check(self) -> None:
        """Check the limits; called before each batch of windows.

        Raises:
            MethodTimeout: the time limit has passed, or the limit of passes is reached.
        """
        if (follows := _OBSERVER.get()) is not None:
            follows.check()
        if self._pass_limit is not None and self.passes >= self._pass_limit:
            raise MethodTimeout(f"stopped at the limit of {self._pass_limit} window passes")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise MethodTimeout(
                f"stopped at the time limit of {self._limit:g} s after {self.passes} window passes: raise the limit, "
                "or choose a target with fewer windows"
            )

    def warn(self, text: str, label: str | None = None) -> None:
        """Collect a warning and log it, each text once.

        Args:
            text: the warning.
            label: label of the score that it concerns, put before the text; None: it concerns all scores.
        """
        text = text if label is None else f"{label}: {text}"
        if text not in self.warnings:
            self._labels[text] = label
            self.warnings.append(text)
            if not self.silent:
                logger.warning(text)

    def warnings_without(self, labels: Sequence[str]) -> list[str]:
        """Return the warnings that concern none of the scores with these labels."""
        return [text for text in self.warnings if self._labels.get(text) not in labels]
