"""What happens during a run: passes counted, progress shown, time limits kept, warnings gathered."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from esegeta_monai.engine.dry_run import Pace
from esegeta_monai.errors import MethodTimeout

__all__ = ["Monitor"]

logger = logging.getLogger("esegeta_monai")


class Monitor:
    """Counts window passes and keeps the time limit of the method that runs.

    Args:
        on_pass: called with the number of windows after each forward pass, for a progress bar.
        silent: warnings are kept, but not logged.
    """

    def __init__(self, on_pass: Callable[[int], None] | None = None, *, silent: bool = False) -> None:
        self.on_pass, self.silent = on_pass, silent
        self.pace: Pace | None = None
        """Where a method is only timed: how much of each loop is run."""
        self.passes = 0
        self.warnings: list[str] = []
        self._about: dict[str, str | None] = {}
        self._deadline: float | None = None
        self._limit = 0.0

    def start(self, time_limit: float | None = None) -> None:
        """Begins a method: counters at zero, the clock at ``time_limit`` seconds (None: no limit)."""
        self.passes, self.warnings, self._about, self._limit = 0, [], {}, time_limit or 0.0
        self._deadline = None if time_limit is None else time.monotonic() + time_limit

    def passed(self, windows: int) -> None:
        """Windows have gone through the network."""
        self.passes += windows
        if self.on_pass is not None:
            self.on_pass(windows)

    @contextmanager
    def once(self) -> Iterator[None]:
        """Passes inside are made once a loop, whatever its length."""
        if self.pace is None:
            yield
            return
        with self.pace.once():
            yield

    def check(self) -> None:
        """Raises `MethodTimeout` where the time limit has passed; called before each window batch."""
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise MethodTimeout(
                f"stopped at the time limit of {self._limit:g} s after {self.passes} window passes: raise the limit, "
                "or choose a target with fewer windows"
            )

    def warn(self, text: str, about: str | None = None) -> None:
        """A warning for the log and the record, once.

        Args:
            about: the label of the score that it is about, which stands before the text; None: of all of them.
        """
        text = text if about is None else f"{about}: {text}"
        if text not in self.warnings:
            self._about[text] = about
            self.warnings.append(text)
            if not self.silent and self.pace is None:  # maps that mean nothing warn of nothing
                logger.warning(text)

    def warnings_without(self, labels: Sequence[str]) -> list[str]:
        """The warnings that are about none of these scores."""
        return [text for text in self.warnings if self._about.get(text) not in labels]
