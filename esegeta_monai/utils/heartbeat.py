"""The heartbeat of a command: its current result, for the process that watches it (`esegeta_monai.cli.watch`)."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Heartbeat"]

VARIABLE = "ESEGETA_WATCHED"
"""As in `esegeta_monai.cli.watch`, which imports nothing of this package."""


class Heartbeat:
    """The heartbeat of a command with ``--hard-time-limit``; without one, nothing is written.

    Args:
        folder: the folder of the heartbeat; None: the command is not watched.
        run: identifier of the command, which stays when it is restarted; see `esegeta_monai.files.runs.RunRecord`.
        separate: cases whose methods and targets must run one by one, because one of several took too long.

    >>> Heartbeat().beat("sub-01", [("liver", "Saliency")])  # nobody watches
    """

    def __init__(self, folder: Path | None = None, run: str | None = None, separate: Sequence[str] = ()) -> None:
        self.folder, self.run, self.separate = folder, run, frozenset(separate)
        self.journal: Path | None = None
        self._number = 0

    @classmethod
    def take(cls) -> Heartbeat:
        """Return the heartbeat that this process was started with; processes that it starts get none.

        On Linux this process also gets SIGTERM when the process that watches it ends.
        """
        text = os.environ.pop(VARIABLE, None)
        if text is None:
            return cls()
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        state = json.loads(text)
        return cls(Path(state["folder"]), state["run"], state["separate"])

    def beat(self, case: str | None, results: Sequence[tuple[str, str]] = (), times: int = 1) -> None:
        """State what is computed from now on.

        Args:
            case: name of the case; None: none, and there is no limit.
            results: target and method of each result, as in ``run.json``; none: the case is prepared or predicted.
            times: how many limits these results may take together.
        """
        if self.folder is None:
            return
        self._number += 1
        state = {"number": self._number, "case": case, "results": [list(r) for r in results], "times": times}
        state["journal"] = None if self.journal is None else str(self.journal)
        temporary = self.folder / "heartbeat.new"
        temporary.write_text(json.dumps(state), encoding="utf-8")
        os.replace(temporary, self.folder / "heartbeat.json")

    def finish(self, case: str, **more: Any) -> None:
        """Note that a case is finished, with JSON-ready entries that a restarted command needs."""
        if self.folder is not None:
            with open(self.folder / "cases.jsonl", "a", encoding="utf-8") as file:
                file.write(f"\n{json.dumps({'case': case, **more})}\n")

    def finished(self) -> dict[str, dict[str, Any]]:
        """Return the entries of the cases that this command finished before it was restarted, by name of the case."""
        path = None if self.folder is None else self.folder / "cases.jsonl"
        if path is None or not path.exists():
            return {}
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        return {entry["case"]: entry for entry in entries}
