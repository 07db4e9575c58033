"""The worker process of the app: it holds one network, and runs requests that equal commands.

Started by `esegeta_monai.app.process.WorkerProcess` as ``python -m esegeta_monai.cli.app_worker``, which describes the
exchange of messages. The bundle's own prints go to standard error.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from esegeta_monai.cli import app_layers
from esegeta_monai.cli.app_jobs import Resident
from esegeta_monai.cli.log import reason
from esegeta_monai.engine.progress import RunObserver, observed
from esegeta_monai.errors import EsegetaError

__all__ = ["main"]

EVERY = 0.1
"""Seconds between two messages of progress."""


class Cancelled(BaseException):
    """The page has cancelled the job; no `Exception`, which a run would record as a failure of a method."""


class Channel:
    """Lines of JSON from and to the server, on file descriptors that no bundle's print can reach."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._in = os.fdopen(os.dup(0), encoding="utf-8")
        os.dup2(2, 1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        self.requests: queue.Queue[dict[str, Any]] = queue.Queue()
        self.cancelled: set[int] = set()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._in:
            message = json.loads(line)
            if message["do"] == "cancel":
                self.cancelled.add(message["id"])
            else:
                self.requests.put(message)
        os._exit(0)  # the server has ended, and nobody waits for a result

    def say(self, number: int, event: str, **more: Any) -> None:
        """Send an answer to request ``number``."""
        self._out.write(json.dumps({"id": number, "event": event, **more}) + "\n")
        self._out.flush()


class JobObserver(RunObserver):
    """Sends the progress of a job to the page, and ends the job when it is cancelled."""

    def __init__(self, channel: Channel, number: int) -> None:
        self.channel, self.number = channel, number
        self.done, self.total, self.now = 0, None, ""
        self._last = 0.0

    def began(self, names: str, windows: int | None) -> None:
        self.done, self.total, self.now = 0, windows, names  # type: ignore[assignment]
        self._tell(0.0)

    def passed(self, windows: int) -> None:
        self.done += windows
        self._tell(EVERY)

    def check(self) -> None:
        """Raise `Cancelled` if the page has cancelled the job."""
        if self.number in self.channel.cancelled:
            raise Cancelled

    def _tell(self, every: float) -> None:
        if time.monotonic() - self._last >= every:
            self._last = time.monotonic()
            self.channel.say(self.number, "progress", done=self.done, total=self.total, now=self.now)


def main() -> None:
    """Answer requests until the server ends."""
    channel = Channel()
    logging.getLogger("esegeta_monai").setLevel(logging.WARNING)
    resident: Resident | None = None
    while True:
        request = channel.requests.get()
        number = request["id"]
        try:
            with observed(JobObserver(channel, number)):
                if request["do"] == "open":
                    resident = Resident(request["arguments"], request["folder"])
                    result = resident.description()
                else:
                    assert resident is not None
                    result = _job(resident, request["do"])(request)
            channel.say(number, "done", result=result)
        except Cancelled:
            channel.say(number, "cancelled", error="cancelled; finished maps are kept")
        except EsegetaError as error:
            channel.say(number, "failed", error=str(error))
        except Exception as error:  # a bundle's code may raise anything; the worker goes on
            traceback.print_exc(file=sys.stderr)
            channel.say(number, "failed", error=f"unexpected error: {reason(error)}")


def _job(resident: Resident, name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    jobs: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        "load": resident.load,
        "look": resident.look,
        "costs": resident.costs,
        "explain": resident.explain,
        "evaluate": resident.evaluate,
        "report": resident.report,
        "layers": partial(app_layers.layers, resident),
        "channels": partial(app_layers.channels, resident),
    }
    return jobs[name]


if __name__ == "__main__":
    main()
