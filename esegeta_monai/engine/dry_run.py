"""A method timed without running all of it: of each loop over windows some batches are run, the rest is reckoned.

What a loop adds into is summed over the processes that share it (`Objective.each`): a batch left out is as one that
another process would have run. So the method comes to its end, through all that it does before, between and after its
loops, with maps that mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from esegeta_monai.errors import MethodTimeout

__all__ = ["Loop", "Pace", "Timed"]

PATIENCE = 1.0
"""Seconds that a method may take at least, after the last batch of a new kind of loop, to come to its end."""


@dataclass
class _Seen:
    """What the batches of one kind of loop took so far; and what one such loop takes once, whatever its length."""

    units: int = 0
    seconds: float = 0.0
    passes: float = 0.0
    once_seconds: float = 0.0
    once_passes: float = 0.0


class Pace:
    """How much of a method is run, and what it would take.

    The first batch of each kind of loop is always run. After it a loop goes on for half of what is left of ``budget``;
    what then remains takes as long a unit as what was run. With the budget spent, a loop of a kind that has been seen
    is left out altogether.

    Args:
        budget: seconds, from the first batch on, so that a long start does not eat them.
        now: the clock.
        passes: window passes so far.

    Attributes:
        skipped_seconds, skipped_passes: reckoned for what was not run.
        whole: whether all was run.
    """

    def __init__(self, budget: float, now: Callable[[], float], passes: Callable[[], int]) -> None:
        self.budget, self._now, self._passes = budget, now, passes
        self.skipped_seconds = self.skipped_passes = 0.0
        self.whole = True
        self.first: float | None = None
        self.once_seconds = self.once_passes = 0.0
        self._seen: dict[Hashable, _Seen] = {}
        self._news = 0.0

    def seconds(self) -> float:
        """The clock, as it would stand had everything been run."""
        return self._now() + self.skipped_seconds

    def passes(self) -> float:
        """The window passes, had everything been run."""
        return self._passes() + self.skipped_passes

    @contextmanager
    def once(self) -> Iterator[None]:
        """What is done inside is done once a loop, and tells nothing of its other batches."""
        seconds, passes = self._now(), self._passes()
        try:
            yield
        finally:
            self.once_seconds += self._now() - seconds
            self.once_passes += self._passes() - passes

    def loop(self, kind: Hashable, *, least: int = 0, skips: bool = True) -> Loop:
        """A loop begins.

        Args:
            kind: loops of one kind take as long a unit.
            least: units that it cannot do without, whatever has been seen.
            skips: whether units may be left out.

        Raises:
            MethodTimeout: it goes on and on with loops that have been seen.
        """
        return Loop(self, kind, least, skips)

    def _left(self) -> float:
        """Seconds of the budget that are left."""
        now = self._now()
        if self.first is None:
            self.first = self._news = now
        return self.first + self.budget - now

    def _tired(self) -> bool:
        assert self.first is not None
        return self._now() > max(self.first + self.budget, self._news) + max(self.budget, PATIENCE)


class Loop:
    """One loop over windows, see `Pace.loop`."""

    def __init__(self, pace: Pace, kind: Hashable, least: int, skips: bool) -> None:
        self.pace, self.skips = pace, skips
        left = pace._left()
        self.seen = pace._seen.setdefault(kind, _Seen())
        self.least = least if self.seen.units else 1
        self.until = pace._now() + max(0.0, left) / 2
        self._stop_if_tired()
        self.began, self.passes = pace.seconds(), pace.passes()
        self.once_seconds, self.once_passes = pace.once_seconds, pace.once_passes

    def enough(self, done: int) -> bool:
        """Whether the rest is left out, after ``done`` units; asked before each batch."""
        if done < self.least:
            return False
        if not self.skips:
            self._stop_if_tired()
            return False
        return self.pace._now() >= self.until

    def end(self, done: int, total: Callable[[], int]) -> None:
        """The loop is over after ``done`` units: the others of ``total()`` are reckoned.

        Counting them takes no time on the clock.
        """
        pace, seen = self.pace, self.seen
        once_seconds, once_passes = pace.once_seconds - self.once_seconds, pace.once_passes - self.once_passes
        seconds = pace.seconds() - self.began - once_seconds
        passes = pace.passes() - self.passes - once_passes
        if done:
            if not seen.units:
                pace._news = pace._now()
            seen.units += done
            seen.seconds += seconds
            seen.passes += passes
            seen.once_seconds, seen.once_passes = once_seconds, once_passes
        began = pace._now()
        rest = total() - done
        pace.skipped_seconds -= pace._now() - began
        if rest > 0:
            mine = _Seen(done, seconds, passes) if done else seen
            pace.whole = False
            pace.skipped_seconds += rest * mine.seconds / mine.units
            pace.skipped_passes += rest * mine.passes / mine.units
            if not done:
                pace.skipped_seconds += seen.once_seconds
                pace.skipped_passes += seen.once_passes

    def _stop_if_tired(self) -> None:
        if self.seen.units and self.pace._tired():
            raise MethodTimeout("stopped: it goes on with what has been seen")


@dataclass(frozen=True)
class Timed:
    """What a `Pace` wants to know of a loop over windows.

    Attributes:
        kind, least: see `Objective.each`.
        skips: whether jobs may be left out.
        whole_windows: whether it may only end between two windows.
    """

    kind: Hashable
    least: int
    skips: bool
    whole_windows: bool

    def loop(self, pace: Pace | None, number: int, group: Sequence[tuple[int, int]]) -> Loop | None:
        """The loop over one group of jobs (volume, window), None where all of it is run; windows that no
        target sees are a kind of their own."""
        if pace is None or not group:
            return None
        return pace.loop((self.kind, number), least=self.least, skips=self.skips)

    def may_end(self, group: Sequence[tuple[int, int]], done: int) -> bool:
        """Whether it may end after ``done`` jobs."""
        return not (self.whole_windows and done and group[done][1] == group[done - 1][1])
