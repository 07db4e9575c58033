"""The HTTP server of the app: one page, its data, and jobs for the worker."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from esegeta_monai.app.process import Job, WorkerProcess
from esegeta_monai.app.questions import Question
from esegeta_monai.app.security import Guard, Session
from esegeta_monai.app.view import Views, page
from esegeta_monai.errors import EsegetaError

__all__ = ["App"]

ALIVE = 15.0
"""Seconds after which an event stream without events sends a comment, so that tunnels keep it."""
BEYOND = 60.0
"""Seconds beyond the time limit after which the worker of a job is ended."""
REPORT_POLICY = "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:"
"""A report may run its own scripts (its own policy has their hashes), but it is no page of this server."""


class App:
    """The app: session, worker and routes.

    Args:
        command: the command of the worker process.
        arguments: options of ``esegeta-monai app`` for the worker, JSON-ready.
        output: output folder.

    Attributes:
        session: secrets of this start.
        worker: the worker process.
        asgi: the application for an ASGI server.
    """

    def __init__(self, command: list[str], arguments: Mapping[str, Any], output: Path) -> None:
        self.session, self.output = Session(), output
        self._folder = tempfile.TemporaryDirectory(prefix="esegeta-app-")  # readable by this user only
        first = {"arguments": dict(arguments), "folder": self._folder.name}
        self.worker = WorkerProcess(command, first, self._publish)
        self.views = Views(output)
        self._loaded: dict[int, dict[str, Any]] = {}
        self._layers: list[str] = []
        self._listeners: dict[asyncio.Queue[dict[str, Any]], asyncio.AbstractEventLoop] = {}
        routes = [
            Route("/start", self.start),
            Route("/", self.page),
            Route("/api/state", self.state),
            Route("/api/events", self.events),
            Route("/api/cases/{case:int}/view", self.view, methods=["POST"]),
            Route("/api/look", self.look, methods=["POST"]),
            Route("/api/layers", self.layers, methods=["POST"]),
            Route("/api/channels", self.channels, methods=["POST"]),
            Route("/api/costs", self.costs, methods=["POST"]),
            Route("/api/jobs", self.submit, methods=["POST"]),
            Route("/api/jobs/{job:int}/cancel", self.cancel, methods=["POST"]),
            Route("/api/views/{view}/{volume}", self.volume),
            Route("/files/{name}", self.file),
        ]
        errors: dict[Any, Any] = {EsegetaError: _refused, HTTPException: _http_error}
        inner: Any = Starlette(routes=routes, exception_handlers=errors)
        self.asgi = Guard(inner, self.session)

    def close(self) -> None:
        """End the worker, and remove the volumes of predictions."""
        self.worker.close()
        self._folder.cleanup()

    # -- pages --------------------------------------------------------------------------------------------------

    async def start(self, request: Request) -> Response:
        """Exchange the token for the session's cookie."""
        cookie = self.session.exchange(request.query_params.get("token", ""))
        if cookie is None:
            text = "This address has been used, or is wrong. Stop esegeta-monai app and start it again for a new one."
            return Response(text, 403, media_type="text/plain")
        return RedirectResponse("/", 303, {"set-cookie": cookie})

    async def page(self, _: Request) -> Response:
        """Return the page."""
        html, policy = page()
        return HTMLResponse(html, headers={"content-security-policy": policy})

    async def file(self, request: Request) -> Response:
        """Return a report by its id."""
        path = self.views.file(request.path_params["name"])
        if path is None or not path.is_file():
            raise HTTPException(404)
        policy = {"content-security-policy": REPORT_POLICY + _scripts_of(path), "x-frame-options": "DENY"}
        return FileResponse(path, headers=policy, media_type="text/html")

    # -- data ---------------------------------------------------------------------------------------------------

    async def state(self, _: Request) -> Response:
        """Return what the page shows first."""
        jobs = [self._public(job.to_json()) for job in list(self.worker.jobs.values()) if not job.hidden]
        return JSONResponse({"worker": self.worker.state(), "bundle": self.worker.opened, "jobs": jobs})

    async def events(self, _: Request) -> Response:
        """Return the changes of jobs and worker as server-sent events."""
        listener: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._listeners[listener] = asyncio.get_running_loop()

        async def stream() -> AsyncIterator[str]:
            try:
                yield ": connected\n\n"
                while True:
                    try:
                        event = await asyncio.wait_for(listener.get(), ALIVE)
                    except asyncio.TimeoutError:
                        yield ": alive\n\n"
                        continue
                    yield f"data: {json.dumps(event)}\n\n"
            finally:
                self._listeners.pop(listener, None)

        return StreamingResponse(stream(), media_type="text/event-stream")

    def _publish(self, event: dict[str, Any]) -> None:
        """Give an event to all listeners; called from the worker's threads."""
        if event["event"] == "job":
            event = {**event, "job": self._public(event["job"])}
        for listener, loop in list(self._listeners.items()):
            if not loop.is_closed():
                loop.call_soon_threadsafe(listener.put_nowait, event)

    def _public(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return a job with ids in place of the paths of pages."""
        result = job["result"]
        if result is not None and "channels" in result:  # the answer of the request has them
            job = {**job, "result": {}}
        elif result is not None and "pages" in result:
            pages = {name: self.views.add_file(Path(path)) for name, path in result["pages"].items()}
            job = {**job, "result": {k: v for k, v in result.items() if k != "index"} | {"pages": pages}}
        return job

    async def view(self, request: Request) -> Response:
        """Load a case if it is new, and return its view."""
        body, case = await _body(request), int(request.path_params["case"])
        names = self._opened()["cases"]
        if not 0 <= case < len(names):
            raise HTTPException(404)
        show = body.get("show")
        if show is not None and not (isinstance(show, list) and all(isinstance(n, int) for n in show)):
            raise HTTPException(400, "show is a list of numbers")
        newest = body.get("newest")
        if newest is not None and not (isinstance(newest, list) and all(isinstance(t, str) for t in newest)):
            raise HTTPException(400, "newest is a target and a method")
        loaded = await self._load(case)
        view = await run_in_threadpool(self.views.make, names[case], loaded, show, newest)
        shown = {k: loaded[k] for k in ("dims", "has_map", "scores", "head", "windows", "shown")}
        return JSONResponse({**view, **shown})

    async def volume(self, request: Request) -> Response:
        """Return a volume of a view, zlib, with how it is packed in the headers."""
        data, packed = self.views.volume(request.path_params["view"], request.path_params["volume"])
        headers = {"x-delta": str(int(packed.delta)), "x-width": str(packed.width)}
        return Response(data, headers=headers, media_type="application/octet-stream")

    async def look(self, request: Request) -> Response:
        """Return the network's classes at a voxel of a view."""
        body = await _body(request)
        world = self._world(body.get("view"), body.get("voxel"))
        case = self.views.get(body["view"]).case
        answer = await self._ask({"do": "look", "case": case, "world": world}, "look")
        return JSONResponse({**answer, "world": world})

    async def layers(self, request: Request) -> Response:
        """Return the network's layers with shapes and times."""
        case = (await _body(request)).get("case")
        if not isinstance(case, int) or isinstance(case, bool) or not 0 <= case < len(self._opened()["cases"]):
            raise HTTPException(404)
        answer = await self._ask({"do": "layers", "case": case}, "layers")
        self._layers = [layer["name"] for layer in answer["layers"]]
        return JSONResponse(answer)

    async def channels(self, request: Request) -> Response:
        """Return the channels of a layer, by its place in the list of layers, at a voxel of a view."""
        body = await _body(request)
        world, view = self._world(body.get("view"), body.get("voxel")), self.views.get(body["view"])
        layer, plane, order = body.get("layer"), body.get("plane"), body.get("order")
        planes = view.data["planes"]
        layer, plane = _number(layer, len(self._layers)), _number(plane, len(planes))
        if order not in ("activation", "relevance"):
            raise HTTPException(400, "order is activation or relevance")
        asked = {
            **self._question({**body, "case": view.case}),
            **{"do": "channels", "layer": self._layers[layer], "world": world, "order": order},
            "plane": {key: planes[plane][key] for key in ("through", "across", "up", "mirrored")},
        }
        title = f"Relevance of the channels of {asked['layer']}"
        return JSONResponse(await self._ask(asked, title, hidden=order == "activation"))

    # -- jobs ---------------------------------------------------------------------------------------------------

    async def costs(self, request: Request) -> Response:
        """Return the cost of a question before it is asked."""
        return JSONResponse(await self._ask({"do": "costs", **self._question(await _body(request))}, "cost"))

    async def submit(self, request: Request) -> Response:
        """Add a job: ``do`` is explain, evaluate or report."""
        body = await _body(request)
        kind = body.get("do")
        if kind == "report":
            return JSONResponse(self.worker.submit({"do": "report"}, "Write the report").to_json())
        if kind not in ("explain", "evaluate"):
            raise HTTPException(400, "do is explain, evaluate or report")
        question = self._question(body)
        limit = question["time_limit"]
        if kind == "explain" and limit is not None:
            question["hard_limit"] = 2 * limit + BEYOND
        title = body.get("title")
        title = title[:200] if isinstance(title, str) else kind
        job = self.worker.submit({"do": kind, **question}, title)
        return JSONResponse(job.to_json())

    async def cancel(self, request: Request) -> Response:
        """Cancel a job."""
        stopped = await run_in_threadpool(self.worker.cancel, int(request.path_params["job"]))
        return JSONResponse({"cancelled": stopped})

    def _question(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the request for the worker; voxels of a view become places."""
        opened = self._opened()
        view, target = body.get("view"), body.get("target")
        body = dict(body)
        if isinstance(target, dict) and "voxel" in target:
            body["target"] = {**target, "world": self._world(view, target["voxel"])}
        if isinstance(body.get("box"), list):
            body["box"] = [self._world(view, corner) for corner in body["box"]]
        names = {int(index): name for index, name in opened["classes"].items()}
        question = Question.of(body, len(opened["cases"]), names, self._layers)
        return {
            "case": question.case,
            "target": question.target,
            "methods": list(question.methods),
            "box": None if question.box is None else [list(corner) for corner in question.box],
            "baseline": question.baseline,
            "time_limit": question.time_limit,
            "costly": question.costly,
            "metrics": list(question.metrics),
        }

    def _world(self, view: Any, voxel: Any) -> list[float]:
        if not isinstance(view, str) or not isinstance(voxel, list) or len(voxel) != 3:
            raise HTTPException(400, "give a view and a voxel of three numbers")
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in voxel):
            raise HTTPException(400, "a voxel has three whole numbers")
        case = self.views.get(view).case
        return self.views.world(view, voxel, self._loaded[case]["dims"])

    def _opened(self) -> dict[str, Any]:
        if self.worker.opened is None:
            raise HTTPException(503, self.worker.problem or "the bundle is being opened")
        return self.worker.opened

    async def _load(self, case: int) -> dict[str, Any]:
        if case not in self._loaded:
            self._loaded[case] = await self._ask({"do": "load", "case": case}, "load")
        return self._loaded[case]

    async def _ask(self, request: Mapping[str, Any], title: str, *, hidden: bool = True) -> dict[str, Any]:
        """Give the worker a job, which the page does not list if it is hidden, and wait for its result."""
        job: Job = self.worker.submit(request, title, hidden=hidden)
        while not await run_in_threadpool(job.finished.wait, 1.0):
            pass
        if job.result is None:
            raise HTTPException(409, job.error or "cancelled")
        return job.result


def _number(value: Any, count: int) -> int:
    """Return the number of one of ``count`` layers or planes."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise HTTPException(400, "no such layer or plane")
    return value


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except ValueError as error:
        raise HTTPException(400, "no JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "send an object")
    return body


def _scripts_of(path: Path) -> str:
    """Return the part of a policy that allows what a report's own policy allows."""
    text = path.read_text(encoding="utf-8", errors="replace")
    hashes = re.search(r"script-src ((?:'sha256-[A-Za-z0-9+/=]+' ?)+)", text[:4000].replace("&#39;", "'"))
    return f"; script-src {hashes[1].strip()}" if hashes else ""


async def _refused(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)
