"""Join the parts of a run: their results in one record, and their files in one folder."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import esegeta_monai.files as storage
from esegeta_monai.errors import UsageError
from esegeta_monai.files.journal import Journal, read_run
from esegeta_monai.files.layout import same_layout
from esegeta_monai.files.runs import UNFINISHED
from esegeta_monai.output.evaluation_writer import LOCK, EvaluationWriter, read_table
from esegeta_monai.utils.files import refuse_remote, write_json
from esegeta_monai.utils.leftovers import PREFIX

__all__ = ["MergedRuns", "merge_runs"]

OF_A_RUN = ("run.json", "run.json.unreadable", "metrics.csv", "esegeta.log", "index.html", LOCK)
"""Files that each folder has for itself; they are joined or written again, not copied."""


@dataclass
class MergedRuns:
    """The results that `merge_runs` joined.

    Attributes:
        cases: number of cases.
        counts: number of results by status.
        copied: number of files that were copied.
        unfinished: journals of parts that were stopped, or that still run.
    """

    cases: int
    counts: dict[str, int]
    copied: int = 0
    unfinished: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """1 if a part is not finished or a result failed, else 0."""
        return int(bool(self.unfinished) or any(self.counts.get(status) for status in UNFINISHED))


def merge_runs(folder: str | os.PathLike[str], others: Sequence[str | os.PathLike[str]] = ()) -> MergedRuns:
    """Write ``run.json`` of a folder from all journals in it, after bringing the results of other folders into it.

    Maps, pictures, records and tables of the other folders are copied, their rows of ``metrics.csv`` and their results
    are added. The other folders stay as they are.

    Args:
        folder: the output folder of a run; it is created if there are others.
        others: output folders of other parts.

    Raises:
        UsageError: a folder has no results or another layout, or a file that two folders have differs; nothing has been
            written.
    """
    for given in (folder, *others):
        refuse_remote(given)
    folder, sources = Path(folder), [Path(other) for other in others]
    for place in sources or [folder]:
        if not place.is_dir() or not (read_run(place).results or (place / "metrics.csv").is_file()):
            raise UsageError(f"{place} has no results and no metrics.csv: give output folders of runs")
    same_layout(folder, sources)
    copies = list(_copies(folder, sources))
    tables = _rows(folder, sources)
    storage.writable_folder(folder)
    for source, target in copies:
        with storage.atomic(target) as temporary:
            shutil.copyfile(source, temporary)
    if tables:
        EvaluationWriter(folder, [], []).add_rows(tables)
    if sources:
        journal = Journal(folder / "run.jsonl")
        for source in sources:
            contents = read_run(source)
            lines = _named(contents.lines)
            known = {(e["case"], e.get("target"), e.get("method")) for e in lines}
            old = [e for e in _named(contents.results) if (e["case"], e.get("target"), e.get("method")) not in known]
            for entry in [*({**e, "recorded": ""} for e in old), *lines]:
                journal.append(entry)
    contents = read_run(folder)
    results = _named(contents.results)
    counts = dict(sorted(Counter(str(e.get("status")) for e in results).items()))
    if contents.results:
        write_json(folder / "run.json", {**contents.info, "summary": counts, "results": contents.results})
    unfinished = [name for place in (folder, *sources) for name in read_run(place).unfinished]
    return MergedRuns(len({e["case"] for e in results}), counts, len(copies), unfinished)


def _named(entries: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the entries that name a case, and a target and method or none, in text; a damaged record has others."""
    return [
        e
        for e in entries
        if isinstance(e, dict)
        and isinstance(e.get("case"), str)
        and all(isinstance(e.get(name), (str, type(None))) for name in ("target", "method"))
    ]


def _copies(folder: Path, sources: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield source and target of each file to copy, sidecars last, since they mark a map as finished.

    Raises:
        UsageError: two folders have a file of one name with different contents.
    """
    planned: dict[Path, Path] = {}
    for source in sources:
        for path in sorted(source.rglob("*")):
            place = path.relative_to(source)
            if (
                not path.is_file()
                or path.is_symlink()
                or any(part.startswith((PREFIX, ".scores")) for part in place.parts)
            ):
                continue
            if path.name in OF_A_RUN or path.name.endswith(("_report.html", ".jsonl")):
                continue
            existing = planned.get(folder / place, folder / place)
            if not existing.exists():
                planned[folder / place] = path
            elif storage.sha256_file(existing) != storage.sha256_file(path):
                raise UsageError(f"{place} differs in {existing} and {path}: a case must be in one part only")
    yield from sorted(((s, t) for t, s in planned.items()), key=lambda pair: (pair[1].suffix == ".json", str(pair[1])))


def _rows(folder: Path, sources: Sequence[Path]) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the sources' tables by case.

    Raises:
        UsageError: two tables have different rows of a case.
    """
    rows: dict[str, list[dict[str, str]]] = {}
    known: dict[str, list[dict[str, str]]] = {}
    for place in (folder, *sources):
        of_place: dict[str, list[dict[str, str]]] = {}
        for row in read_table(place / "metrics.csv"):
            of_place.setdefault(row["case"], []).append(row)
        for case, several in of_place.items():
            if known.setdefault(case, several) != several:
                raise UsageError(f"metrics.csv in {place} has other values for {case} than another folder")
        if place != folder:
            rows |= of_place
    return rows
