"""A case for the report's viewer: the scan, the prediction and finished maps."""

from __future__ import annotations

import base64
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import FunctionLoader
from markupsafe import Markup

from esegeta_monai.app.security import page_policy
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.record import Record
from esegeta_monai.output.report.collect import CaseResults, Result, read_output
from esegeta_monai.output.report.embed import embed
from esegeta_monai.output.report.memo import Memo
from esegeta_monai.output.report.page import viewer_context
from esegeta_monai.output.report.render import VIEWER, environment, read_text
from esegeta_monai.output.report.volumes import Packed

__all__ = ["Views", "page"]

BUDGET = 60_000_000
"""Largest number of characters of the volumes of a view; they stay on this machine."""
SHOWN = 4
"""Number of maps in the first view of a case: the newest."""
VOLUMES = 20
"""Number of things made for a view that are kept for the next one."""
KEPT = 3
"""Number of views that are kept; a page shows the newest."""


def own_text(name: str) -> str:
    """Return the text of a file of this package."""
    return (files("esegeta_monai.app") / name).read_text(encoding="utf-8")


TEMPLATES = FunctionLoader(lambda name: own_text(name) if name in ("page.html", "view.html") else None)


def page() -> tuple[str, str]:
    """Return the page and its content security policy."""
    scripts = [read_text("theme.js"), *(read_text(name) for name in VIEWER), own_text("network.js"), own_text("app.js")]
    styles = [read_text("report.css"), own_text("app.css")]
    template = environment(TEMPLATES).get_template("page.html")
    html = template.render(scripts=[Markup(s) for s in scripts], styles=[Markup(s) for s in styles])  # our own files
    return html, page_policy(scripts, styles)


@dataclass
class View:
    """A case as the browser shows it.

    Attributes:
        case: number of the case.
        volumes: by the ids of the data.
        data: of the viewer.
        to_scan: (4, 4) shown voxel to world, mm, of the scan's own affine.
    """

    case: int
    volumes: dict[str, Packed]
    data: dict[str, Any]
    to_scan: np.ndarray


class Views:
    """The views that were sent, by secret ids, and the numbers of results and files that the page uses.

    Args:
        output: the output folder of the command line.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._views: OrderedDict[str, View] = OrderedDict()
        self._numbers: dict[tuple[str, str, str], int] = {}
        self._files: dict[str, Path] = {}
        self._memo = Memo(KEPT * VOLUMES)

    def results(self, case: str) -> list[Result]:
        """Return the results of a case in the output folder, the oldest first."""
        try:
            run = read_output(self.output)
        except UsageError:  # nothing has been explained yet
            return []
        return next((c.explained for c in run.cases if c.name == case), [])

    def listing(self, case: str) -> list[dict[str, Any]]:
        """Return the results of a case for the page, JSON-ready, each with its number."""
        return [
            {
                "number": self._number(case, r),
                "target": r.target,
                "method": r.method,
                "status": r.status,
                "reason": r.reason,
                "seconds": r.seconds,
            }
            for r in self.results(case)
        ]

    def _number(self, case: str, result: Result) -> int:
        key = (case, str(result.target), str(result.method))
        return self._numbers.setdefault(key, len(self._numbers))

    def make(
        self, case: str, loaded: Mapping[str, Any], show: Sequence[int] | None, newest: Any = None
    ) -> dict[str, Any]:
        """Return HTML and data of a case, and the id of its view.

        Args:
            case: name of the case.
            loaded: answer of the worker that loaded the case.
            show: numbers of the maps to show; None: the newest.
            newest: target and method of the map that is selected first; None: the viewer's choice.
        """
        results_of_case = self.results(case)
        with_map = [r for r in results_of_case if r.map is not None and not r.synthesised]
        if show is None:
            chosen = sorted(with_map, key=lambda r: r.map.stat().st_mtime if r.map is not None else 0.0)[-SHOWN:]
        else:
            chosen = [r for r in with_map if self._number(case, r) in show]
        own = [_prediction(entry, loaded) for entry in loaded["prediction"]]
        results = CaseResults(case, [*own, *chosen], Path(loaded["scan"]))
        embedded = embed(results, radiological=True, budget=BUDGET, effort=1, memo=self._memo)
        context = viewer_context(
            results, embedded, {id(r): None for r in results.explained}, self.output / "index.html"
        )
        data = embedded.data
        for detail in context["details"]:
            detail["href"] = None  # the page has no paths
        for entry in data["maps"]:
            if entry["place"] < len(own):
                entry |= _words(loaded["prediction"][entry["place"]])
                context["details"][data["maps"].index(entry)] |= {"text": entry["text"], "facts": [], "cautions": []}
            else:
                entry["number"] = self._number(case, results.explained[entry["place"]])
        for i, entry in enumerate(data["maps"]):
            result = results.explained[entry["place"]]
            if newest is not None and [result.target, result.method] == list(newest):
                data["first"] = i
        html = (
            environment(TEMPLATES)
            .get_template("view.html")
            .render(**context, notes=embedded.notes, case=case, orientation="")
        )
        name = secrets.token_urlsafe(12)
        file_affine = np.asarray(loaded["scan_affine"], dtype=float)
        to_scan = file_affine @ np.linalg.inv(np.asarray(loaded["affine"], dtype=float)) @ np.asarray(data["affine"])
        self._views[name] = View(loaded["case"], embedded.volumes, data, to_scan)
        while len(self._views) > KEPT:
            self._views.popitem(last=False)
        return {"view": name, "html": html, "data": data, "results": self.listing(case), "notes": embedded.notes}

    def get(self, view: str) -> View:
        """Return a view.

        Raises:
            UsageError: there is none with this id.
        """
        if view not in self._views:
            raise UsageError("this view is gone: reload the page")
        return self._views[view]

    def volume(self, view: str, name: str) -> tuple[bytes, Packed]:
        """Return the bytes of a volume and how they are packed.

        Raises:
            UsageError: there is no such view or volume.
        """
        volumes = self.get(view).volumes
        if name not in volumes:
            raise UsageError("no such volume")
        return base64.b64decode(volumes[name].text), volumes[name]

    def world(self, view: str, voxel: Sequence[float], dims: int) -> list[float]:
        """Return the place, mm, of a shown voxel (x, y, z), with as many numbers as the network's image has axes.

        Raises:
            UsageError: there is no such view, or the voxel is outside.
        """
        shown = self.get(view)
        if any(not 0 <= v < n for v, n in zip(voxel, shown.data["size"])):
            raise UsageError("this voxel is outside the view")
        place = shown.to_scan @ [*voxel, 1.0]
        return [round(float(v), 3) for v in place[:dims]]

    def add_file(self, path: Path) -> str:
        """Return an id under which a file may be read."""
        for name, known in self._files.items():
            if known == path:
                return name
        name = secrets.token_urlsafe(12)
        self._files[name] = path
        return name

    def file(self, name: str) -> Path | None:
        """Return the file of an id; None: there is none."""
        return self._files.get(name)


def _prediction(entry: Mapping[str, Any], loaded: Mapping[str, Any]) -> Result:
    """Return the prediction of a class as a result that the viewer shows like a map."""
    record = Record()
    record.method = "Prediction" if entry["class"] is not None else "Scan"
    record.produces, record.signed, record.additive = "input map", False, False
    record.units = entry["units"] or "nothing"
    record.display = {"affine": loaded["affine"], "oriented": loaded["oriented"]}
    mask = None if entry["mask"] is None else Path(entry["mask"])
    return Result(entry["target"], record.method, "ok", record=record, map=Path(entry["map"]), mask=mask)


def _words(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts of a map of the prediction."""
    if entry["class"] is None:
        text, low, high = "The scan alone: the network gives no map of classes.", "", ""
    else:
        text = "The prediction of the network, not an explanation. Click a voxel, and ask why."
        low, high = f"low {entry['units']}", f"high {entry['units']}"
    return {"text": text, "low": low, "high": high, "effect": False, "class": entry["class"], "nil": None}
