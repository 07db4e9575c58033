"""Read an output folder: the results of each case, with maps, copies, metrics and region tables.

Only the folder itself is read. Every text is passed through `esegeta_monai.files.privacy`, so that neither folders
nor names of scan files reach a page; cases have the names given by the user.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.record import Record
from esegeta_monai.files.integrity import checked_map, checked_neighbour
from esegeta_monai.files.journal import read_run
from esegeta_monai.files.layout import Layout
from esegeta_monai.files.maps import WITH_MAP, sidecar_path
from esegeta_monai.files.privacy import private, without_paths
from esegeta_monai.files.runs import STATUSES
from esegeta_monai.output.report.reading import fitted, table
from esegeta_monai.utils.files import inside, read_json
from esegeta_monai.utils.names import safe_name

__all__ = ["CaseResults", "Curve", "Result", "Run", "read_output"]

CONTROL = "control:"
ALTERED = "altered"
"""Status of a result whose map is not the file that ``explain`` wrote; it is not shown."""
OF_A_METRIC = ("target", "method", "metric")
"""Entries that every row of a metric must have."""


@dataclass
class Result:
    """The result of one method for one target.

    Attributes:
        target, method: names as in ``run.json``; both None if the case failed as a whole.
        status: as in ``run.json``; for a skipped result, the status of its sidecar; ``altered`` if its map is not the
            file that ``explain`` wrote.
        reason, traceback: cause of a failure.
        record: the sidecar; without entries if there is none.
        map, mask: files, if they exist.
        seconds, warnings: as in ``run.json``.
        parameters_text, gap_high, file, href: texts and flags for the page, set by `write_report`.
    """

    target: str | None
    method: str | None
    status: str
    reason: str | None = None
    traceback: str | None = None
    record: Record = field(default_factory=Record)
    map: Path | None = None
    mask: Path | None = None
    seconds: float | None = None
    warnings: list[str] = field(default_factory=list)
    parameters_text: str = ""
    gap_high: bool = False
    file: str | None = None
    href: str | None = None

    @property
    def synthesised(self) -> bool:
        """True if the map is a synthesised image, not an attribution of the scan."""
        return self.record.produces == "synthesised image"


@dataclass
class Curve:
    """A curve of the evaluation: name, target, method and points."""

    name: str
    target: str
    method: str
    x: list[float]
    y: list[float]


@dataclass
class CaseResults:
    """The results of one case.

    Attributes:
        name: name of the case.
        results: one per target and method, and one if the case failed as a whole.
        scan: grey copy of the scan, if it exists.
        metrics, curves, regions: results of the evaluation.
        notes: files and entries that could not be used.
    """

    name: str
    results: list[Result] = field(default_factory=list)
    scan: Path | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def explained(self) -> list[Result]:
        """Results of a target and a method: all but the failure of a whole case."""
        return [r for r in self.results if r.method is not None]

    @property
    def targets(self) -> list[str]:
        """Targets in the order of the run."""
        return list(dict.fromkeys(str(r.target) for r in self.explained))

    @property
    def methods(self) -> list[str]:
        """Methods in the order of the run."""
        return list(dict.fromkeys(str(r.method) for r in self.explained))

    def counts(self) -> dict[str, int]:
        """Return the number of results by status, in the order of `STATUSES`."""
        counter = Counter(result.status for result in self.results)
        return {status: counter[status] for status in (*STATUSES, ALTERED) if status in counter}


@dataclass
class Run:
    """An output folder."""

    folder: Path
    info: dict[str, Any]
    cases: list[CaseResults]


def read_output(folder: Path) -> Run:
    """Read the results of ``explain`` and ``evaluate`` in ``folder``.

    Raises:
        UsageError: there is no such folder, or it has no results.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder; give the output folder of 'esegeta-monai explain'")
    whole: list[str] = []
    """Notes that concern all cases."""
    contents = read_run(folder)
    whole += contents.notes
    info = fitted(contents.info, "run.json", whole)
    own: dict[str, list[str]] = {}
    sidecars = {
        path: fitted(record, path.name, own.setdefault(str(record["case"]), [])) for path, record in _sidecars(folder)
    }
    entries = _entries(contents.results, whole)
    if not entries and not sidecars:
        raise UsageError(
            f"{folder} has neither a run.json nor maps: run 'esegeta-monai explain --output {folder}' first"
        )
    cases: dict[str, CaseResults] = {}
    used: set[Path] = set()
    for entry in entries:
        case = cases.setdefault(str(entry["case"]), CaseResults(str(entry["case"])))
        path = _sidecar_of(entry, folder, sidecars)
        if path is not None:
            used.add(path)
        case.results.append(_result(entry, path, sidecars, folder))
    for path in sorted(set(sidecars) - used):  # results of runs whose run.json was deleted
        record = sidecars[path]
        case = cases.setdefault(str(record["case"]), CaseResults(str(record["case"])))
        names = record.get("result") or {}
        entry = {
            "target": names.get("target", record.get("target_name")),
            "method": names.get("method", record.get("method_name")),
            "status": record["status"],
            "case": case.name,
        }
        case.results.append(_result(entry, path, sidecars, folder))
    metrics = _metrics(folder, whole)
    for case in cases.values():
        case.notes = [*whole, *own.get(case.name, [])]
        case.scan = _scan(folder, case)
        case.metrics = _as_in_run(metrics.get(case.name) or _case_metrics(folder, case.name), case)
        case.curves = list(_curves(_beside(folder, case.name, "metrics.json")))
        case.regions = _as_in_run(_regions(folder, case), case)
    return Run(folder, info, list(cases.values()))


def _entries(several: list[Any], notes: list[str]) -> list[dict[str, Any]]:
    """Return the entries of run.json that state case, target, method and status; note the others."""
    entries = [fitted(e, "run.json", notes) for e in several if isinstance(e, dict)]
    entries = [
        e
        for e in entries
        if "case" in e and e.get("status") in STATUSES and (e.get("target") is None) == (e.get("method") is None)
    ]
    if len(entries) < len(several):
        notes.append(
            f"run.json: {len(several) - len(entries)} results are not as 'explain' wrote them and are left out."
        )
    return entries


def _sidecars(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    depths = ("*.json", "*/*.json", *(("*/*/*.json", "*/*/*/*.json") if Layout.of(folder).bids else ()))
    for path in sorted(path for depth in depths for path in folder.glob(depth)):
        record = read_json(path) if inside(path, folder) else None
        if record is not None and {"case", "method", "target_name"} <= set(record) and record.get("status") in STATUSES:
            yield path, record


def _sidecar_of(entry: Mapping[str, Any], folder: Path, sidecars: Mapping[Path, dict[str, Any]]) -> Path | None:
    """Return the sidecar of an entry of run.json: next to its map, else the one with its target and method."""
    if entry.get("map"):
        path = sidecar_path(folder / str(entry["map"]))
        return path if path in sidecars else None
    if entry.get("status") in ("failed", "timeout") or entry.get("method") is None:
        return None  # a sidecar of these names belongs to an earlier run
    wanted = {"target": entry.get("target"), "method": entry.get("method")}
    for path, record in sidecars.items():
        if record["case"] == entry["case"]:
            names = record.get("result") or {"target": record["target_name"], "method": record.get("method_name")}
            if names == wanted:
                return path
    return None


def _result(
    entry: Mapping[str, Any], path: Path | None, sidecars: Mapping[Path, dict[str, Any]], folder: Path
) -> Result:
    record = Record() if path is None else Record.from_json(private(sidecars[path]))
    skipped = entry["status"] == "skipped"
    status = str(record.status if skipped and path is not None else entry["status"])
    result = Result(
        entry.get("target"),
        entry.get("method"),
        status,
        private(record.reason if skipped else entry.get("reason")),
        without_paths(str(entry["traceback"]), relative=False) if entry.get("traceback") else None,
        record,
        seconds=entry.get("seconds") if entry.get("seconds") is not None else record.seconds,
        warnings=list(dict.fromkeys([*private(entry.get("warnings") or []), *record.warnings])),
    )
    if path is not None and status in WITH_MAP:
        mask = (sidecars[path].get("display") or {}).get("mask")
        try:
            if sidecars[path].get("map") and checked_neighbour(path, sidecars[path]["map"], folder).is_file():
                result.map = checked_map(path, sidecars[path], folder)
            file = None if mask is None else checked_neighbour(path, mask, folder)
            if file is not None and not _is_mask_of(str(entry.get("case", record.case)), file, entry, folder):
                raise InputError(f"{path.name} names the mask {mask!r}, which is not one of its case")
            result.mask = file if file is not None and file.is_file() else None
        except InputError as error:
            result.map, result.status, result.reason = None, ALTERED, str(error)
    elif path is None and entry.get("map"):
        lost = sidecar_path(folder / str(entry["map"]))
        if inside(lost, folder) and lost.is_file():
            text = f"{lost.name} is no record of a map, so the map cannot be verified: run the same command again"
            result.status, result.reason = ALTERED, text
    return result


def _is_mask_of(case: str, file: Path, entry: Mapping[str, Any], folder: Path) -> bool:
    """Return True if a file has the name of a mask of this case."""
    layout = Layout.of(folder)
    if layout.bids:
        return file == layout.mask(case, str(entry.get("target")))
    return file.name.startswith(f"{safe_name(case)}_")


def _scan(folder: Path, case: CaseResults) -> Path | None:
    bids = Layout.of(folder).bids
    paths = [Layout(folder, bids, separate).scan_copy(case.name) for separate in (True, False)]
    return next((path for path in paths if path.is_file() and inside(path, path.parent) and inside(path, folder)), None)


def _beside(folder: Path, case: str, what: str) -> Path:
    """Return the path of a table in the folder of a case; a link to another place counts as missing."""
    path = Layout.of(folder).beside(case, what)
    return path if inside(path, folder) else path.with_name(f"{path.name}.link")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def _metrics(folder: Path, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    by_case: dict[str, list[dict[str, Any]]] = {}
    if not inside(folder / "metrics.csv", folder):
        notes.append("metrics.csv is a link to another folder and is not read.")
        return by_case
    for row in table(folder / "metrics.csv", ("case", *OF_A_METRIC), notes):
        by_case.setdefault(row["case"], []).append(_typed(row))
    return by_case


def _case_metrics(folder: Path, case: str) -> list[dict[str, Any]]:
    content = read_json(_beside(folder, case, "metrics.json")) or {}
    rows: list[Any] = next((content[k] for k in ("metrics", "rows", "results") if isinstance(content.get(k), list)), [])
    return [_typed(row) for row in rows if isinstance(row, dict) and all(row.get(k) for k in OF_A_METRIC)]


def _as_in_run(rows: list[dict[str, Any]], case: CaseResults) -> list[dict[str, Any]]:
    """Return rows with targets and methods named as in ``run.json``, also if they were taken from file names.

    They are in its order too; those of other methods, such as control maps, follow.
    """
    known = {safe_name(name).casefold(): name for name in (*case.targets, *case.methods)}
    for row in rows:
        for key in ("target", "method"):
            row[key] = known.get(safe_name(str(row[key])).casefold(), row[key])
    places = {name: i for i, name in enumerate((*case.targets, *case.methods))}
    return sorted(rows, key=lambda row: [places.get(row[key], len(places)) for key in ("target", "method")])


def _typed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row of text to numbers and booleans; empty and invalid entries become None."""
    typed: dict[str, Any] = {k: private(row.get(k)) for k in ("target", "method", "metric", "group")}
    typed |= {k: number(row.get(k)) for k in ("value", "low", "high", "n", "seconds", "passes")}
    typed |= {k: _truth(row.get(k)) for k in ("higher_is_better", "beats_controls")}
    typed["control"] = str(typed["method"]).startswith(CONTROL)
    return typed


def number(value: Any) -> float | None:
    """Convert to a finite number, or None.

    >>> number("0.5"), number(""), number("nan"), number(None)
    (0.5, None, None, None)
    """
    try:
        converted = float(value)
    except (TypeError, ValueError):
        return None
    return converted if abs(converted) != float("inf") and converted == converted else None


def _truth(value: Any) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value).strip().lower())


def _curves(path: Path) -> Iterator[Curve]:
    """Yield every pair of x and y under ``curves``, named by its own entries, else by the keys of its parents."""
    yield from _walk((read_json(path) or {}).get("curves"), ())


def _walk(value: Any, keys: tuple[str, ...]) -> Iterator[Curve]:
    if isinstance(value, list):
        for entry in value:
            yield from _walk(entry, keys)
    if not isinstance(value, dict):
        return
    if isinstance(value.get("x"), list) and isinstance(value.get("y"), list):
        left = list(keys)
        own = {k: value[k] for k in ("target", "method", "metric", "name", "kind") if value.get(k)}
        name = own.get("metric") or own.get("name") or own.get("kind") or (left.pop() if left else "curve")
        target = own.get("target") or (left.pop(0) if left else "")
        method = own.get("method") or (left.pop(0) if left else "")
        xs = [number(x) for x in value["x"]]
        if None in xs:  # names of layers
            xs = [float(i) for i in range(len(xs))]
        points = [(x, number(y)) for x, y in zip(xs, value["y"])]
        kept = [(x, y) for x, y in points if x is not None and y is not None]
        if kept:
            name, target, method = private([name, target, method])
            yield Curve(name, target, method, [x for x, _ in kept], [y for _, y in kept])
        return
    for key, inner in value.items():
        yield from _walk(inner, (*keys, str(key)))


def _regions(folder: Path, case: CaseResults) -> list[dict[str, Any]]:
    """Read region rows from the table, else from the JSON file of the same name."""
    path = _beside(folder, case.name, "regions.csv")
    needed = ("target", "method", "region")
    rows = table(path, needed, case.notes)
    if not rows:
        content = (read_json(_beside(folder, case.name, "regions.json")) or {}).get("regions")
        several = content if isinstance(content, list) else []
        rows = [row for row in several if isinstance(row, dict) and all(row.get(k) for k in needed)]
    regions = []
    for row in rows:
        typed: dict[str, Any] = {k: private(row.get(k)) for k in needed}
        numbers = ("voxels", "volume_mm3", "sum", "abs_sum", "share_of_abs", "mean")
        typed |= {k: number(row.get(k)) for k in numbers}
        alarm = row.get("alarm")
        truth = _truth(alarm)
        typed["alarm"] = private(str(alarm)) if alarm and truth is None else "alarm" if truth else None
        regions.append(typed)
    return regions
