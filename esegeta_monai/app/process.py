"""The worker process: it is started, asked, watched, ended and started again.

The two processes exchange lines of JSON over pipes, no socket. A request is ``{"id", "do", ...}``, an answer
``{"id", "event", ...}`` with the events ``progress``, ``note``, ``done``, ``failed`` and ``cancelled``; the last three
end a job.
"""

from __future__ import annotations

import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Job", "WorkerProcess"]

State = Literal["waiting", "running", "done", "failed", "cancelled"]

ENDED = ("done", "failed", "cancelled")
GRACE = 10.0
"""Seconds after which a worker that does not stop is ended: after a cancel, and beyond the time limit of a job."""
KEPT = 200
"""Number of jobs that are remembered."""
RESTARTS = 3
"""How often a worker that ends before it is ready is started again."""


@dataclass
class Job:
    """A job and what has become of it.

    Attributes:
        id: number.
        request: what is sent to the worker, JSON-ready.
        title: what the page shows.
        state: see the module.
        done, total: window passes of the current method; ``total`` None: unknown.
        now: names of the methods that run.
        result: answer of the worker, when done.
        error: reason, when failed.
        created, started, ended: seconds since the epoch.
        hidden: True: the page does not list it.
    """

    id: int
    request: dict[str, Any]
    title: str = ""
    state: State = "waiting"
    done: int = 0
    total: int | None = None
    now: str = ""
    result: dict[str, Any] | None = None
    error: str | None = None
    created: float = field(default_factory=time.time)
    started: float | None = None
    ended: float | None = None
    hidden: bool = False
    finished: threading.Event = field(default_factory=threading.Event)

    def to_json(self) -> dict[str, Any]:
        """Return what the page may know."""
        names = ("id", "title", "state", "done", "total", "now", "result", "error", "created", "started", "ended")
        return {name: getattr(self, name) for name in names}


class WorkerProcess:
    """The resident worker and the queue of its jobs; one job runs at a time.

    Args:
        command: the command of the worker process.
        first: its first request, which opens the bundle; sent again after each start.
        changed: called, from other threads, with an event for the page whenever a job or the worker changes.

    Attributes:
        opened: the worker's answer to ``first``; None until it is there.
        problem: why there is no worker; None: all is well.
        restarts: how often a worker was started again.
    """

    def __init__(
        self, command: list[str], first: Mapping[str, Any], changed: Callable[[dict[str, Any]], None] = lambda _: None
    ) -> None:
        self.command, self.first, self.changed = command, dict(first), changed
        self.jobs: dict[int, Job] = {}
        self.opened: dict[str, Any] | None = None
        self.problem: str | None = None
        self.restarts = 0
        self._numbers = itertools.count(1)
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._lock = threading.RLock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._asked: set[int] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="worker-jobs", daemon=True)

    def start(self) -> None:
        """Start the worker and the thread that gives it jobs."""
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None while there is none."""
        return None if self._process is None else self._process.pid

    def wait_until_open(self, seconds: float) -> None:
        """Wait until the bundle is open, or the worker has given up; return after ``seconds`` in any case."""
        until = time.monotonic() + seconds
        while self.opened is None and self.problem is None and time.monotonic() < until:
            time.sleep(0.02)

    def submit(self, request: Mapping[str, Any], title: str = "", *, hidden: bool = False) -> Job:
        """Add a job to the queue."""
        with self._lock:
            job = Job(next(self._numbers), dict(request), title, hidden=hidden)
            self.jobs[job.id] = job
            for old in [n for n, j in self.jobs.items() if j.state in ENDED][: max(0, len(self.jobs) - KEPT)]:
                del self.jobs[old]
        self._queue.put(job)
        self._tell(job)
        return job

    def cancel(self, number: int) -> bool:
        """Ask a job to stop; a worker that does not within `GRACE` seconds is ended and started again.

        Returns:
            False: there is no such job, or it has ended.
        """
        with self._lock:
            job = self.jobs.get(number)
            if job is None or job.state in ENDED:
                return False
            self._asked.add(number)
            if job.state == "waiting":
                self._end(job, "cancelled")
                return True
        self._send({"do": "cancel", "id": number})
        self._answers.put({"id": number, "event": "asked to stop"})
        return True

    def close(self) -> None:
        """End the worker and all jobs."""
        self._closing = True
        self._queue.put(None)
        self._kill()
        if self._thread.is_alive():
            self._thread.join(GRACE)

    # -- the thread of the jobs ---------------------------------------------------------------------------------

    def _work(self) -> None:
        failures = 0
        while not self._closing:
            if self._process is None:
                if failures > RESTARTS:
                    return
                self._open()
                failures = 0 if self._process is not None else failures + 1
                if self.problem is not None:
                    return
                continue
            try:
                job = self._queue.get(timeout=0.5)
            except queue.Empty:
                if self._process.poll() is not None:
                    self._lost()
                continue
            if job is not None and job.state == "waiting":
                self._run(job)

    def _open(self) -> None:
        """Start a process and open the bundle in it."""
        answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            bufsize=1,
        )
        self._process, self._answers = process, answers
        threading.Thread(target=_read, args=(process, answers), name="worker-answers", daemon=True).start()
        self._send({"id": 0, "do": "open", **self.first})
        while True:
            answer = answers.get()
            if answer is None:
                self.problem = (
                    None if self._closing else f"the worker ended while it opened the bundle ({self._code()})"
                )
                break
            if answer["event"] == "done":
                self.opened = answer["result"]
                break
            if answer["event"] == "failed":
                self.problem = answer["error"]
                break
        if self.problem is not None:
            self._kill()
            self._process = None
            for job in list(self.jobs.values()):
                if job.state not in ENDED:
                    self._end(job, "failed", error=self.problem)
        self.changed({"event": "worker", **self.state()})

    def _run(self, job: Job) -> None:
        assert self._process is not None
        job.state, job.started = "running", time.time()
        self._tell(job)
        self._send({"id": job.id, **job.request})
        limit = job.request.get("hard_limit")
        until = None if limit is None else time.monotonic() + limit
        why = f"the job took longer than {limit} s and did not stop: the worker was ended and started again"
        while True:
            wait = None if until is None else max(0.0, until - time.monotonic())
            try:
                answer = self._answers.get(timeout=wait)
            except queue.Empty:
                self._kill()
                cancelled = job.id in self._asked
                text = "cancelled; the worker did not stop by itself, so it was started again" if cancelled else why
                self._end(job, "cancelled" if cancelled else "failed", error=text)
                self._lost(say=False)
                return
            if answer is None:
                text = f"the worker ended ({self._code()}) while it worked on this, and was started again"
                self._end(job, "failed", error=text)
                self._lost()
                return
            if answer.get("id") != job.id:
                continue
            event = answer["event"]
            if event == "asked to stop":
                until = time.monotonic() + GRACE
            elif event == "progress":
                job.done, job.total, job.now = answer["done"], answer["total"], answer["now"]
                self._tell(job)
            elif event in ENDED:
                self._end(job, event, result=answer.get("result"), error=answer.get("error"))
                return

    def _end(self, job: Job, state: State, *, result: dict[str, Any] | None = None, error: str | None = None) -> None:
        with self._lock:
            job.state, job.result, job.error, job.ended = state, result, error, time.time()
            self._asked.discard(job.id)
        job.finished.set()
        self._tell(job)

    def _lost(self, *, say: bool = True) -> None:
        """Note that the worker has ended; the next turn starts another."""
        text = f"The worker ended ({self._code()}) and was started again; finished maps are kept."
        self._process = None
        self.restarts += 1
        if not self._closing:
            self.changed({"event": "restarted", "text": text if say else "", **self.state()})

    def _code(self) -> str:
        process = self._process
        if process is None:
            return "no process"
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def _send(self, message: Mapping[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return
        with self._lock:
            try:
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()
            except (BrokenPipeError, ValueError):  # it has ended; the reader of its answers notes this
                pass

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()

    def _tell(self, job: Job) -> None:
        if not job.hidden:
            self.changed({"event": "job", "job": job.to_json()})

    def state(self) -> dict[str, Any]:
        """Return whether the worker is ready, what is wrong with it, and how often it was started again."""
        return {"ready": self.opened is not None, "problem": self.problem, "restarts": self.restarts}


def _read(process: subprocess.Popen[str], answers: queue.Queue[dict[str, Any] | None]) -> None:
    """Put the answers of a process into a queue, and None at their end."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            answers.put(json.loads(line))
        except ValueError:  # the worker keeps its channel to itself, so this is damage
            print(f"not an answer of the worker: {line[:200]!r}", file=sys.stderr)
    answers.put(None)
