"""Write the results of an `Evaluator`: one table of all cases, and the record, curves and regions of each case."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from monai.data import MetaTensor
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.errors import OutputLost, UsageError
from esegeta_monai.explain.evaluation import EvaluationResult, Evaluator
from esegeta_monai.explain.names import ResultNames
from esegeta_monai.files.layout import Layout
from esegeta_monai.methods.base import Method
from esegeta_monai.targets.base import Target
from esegeta_monai.utils.csv_text import csv_text, plain_rows
from esegeta_monai.utils.distributed import Processes, Share
from esegeta_monai.utils.files import refuse_link_out, write_json
from esegeta_monai.utils.leftovers import remove_leftovers
from esegeta_monai.utils.registry import json_ready
from esegeta_monai.utils.whole_files import check_sources

__all__ = ["COLUMNS", "LOCK", "REGION_COLUMNS", "EvaluationWriter", "read_table"]

LOCK = ".metrics.lock"
"""File in the output folder that is locked while ``metrics.csv`` is read and replaced."""

_FIRST = ("case", "target", "method", "metric", "group", "value", "low", "high", "n", "higher_is_better")
COLUMNS: tuple[str, ...] = (*_FIRST, "beats_controls", "seconds", "passes")
"""Columns of ``metrics.csv``, which has one row per case, target, method and metric."""

_SUMS = ("voxels", "volume_mm3", "sum", "abs_sum", "share_of_abs", "mean")
REGION_COLUMNS: tuple[str, ...] = ("target", "method", "region", *_SUMS, "alarm")
"""Columns of ``<case>_regions.csv``."""


class EvaluationWriter:
    """A writer of ``<output>/metrics.csv`` (tidy, all cases) and, for each case, of ``<case>_metrics.json``,
    ``<case>_regions.csv`` and ``<case>_regions.json``. Cases of earlier runs in the same folder are kept.

    Args:
        output_dir: output folder; it is created if it does not exist.
        methods, targets: those of the run.
        provenance: further entries of every JSON file.
        ranks: the processes that write into this folder; None: this one.
        share: how they share the work, see `esegeta_monai.utils.distributed.Share`; ``"windows"`` needs an `Explainer`
            with ``distributed=True``. The first process writes the table, which includes the cases of the others after
            `join`.

    Attributes:
        done: number of evaluated cases.
        problems: failures, one line per failure.
        not_beating: case, target, method and metric of each value that is no better than a control's.

    Raises:
        UsageError: an unwritable folder, equal names, or an existing ``metrics.csv`` that is another table.
    """

    def __init__(
        self,
        output_dir: str | Path,
        methods: Sequence[Method],
        targets: Sequence[Target],
        provenance: Mapping[str, Any] | None = None,
        *,
        ranks: Processes | None = None,
        share: Share = "cases",
    ) -> None:
        self.methods, self.targets, self.names = methods, targets, ResultNames(methods, targets)
        self.ranks, self.share = ranks or Processes(), share
        self.output_dir = storage.writable_folder(output_dir)
        self.provenance = dict(provenance or {})
        self.path = self.output_dir / "metrics.csv"
        if not self.ranks.rank:
            remove_leftovers(self.output_dir)
            self._earlier()  # raises before anything is computed
        self.done = 0
        self.problems: list[str] = []
        self.not_beating: list[str] = []
        self._summarised = (0, 0, 0)
        self._rows: list[tuple[str, list[dict[str, Any]]]] = []

    @property
    def writes(self) -> bool:
        """True if this process writes the cases that it evaluates."""
        return self.share == "cases" or not self.ranks.rank

    def evaluate(
        self,
        evaluator: Evaluator,
        image: MetaTensor,
        case: str,
        *,
        problems: Mapping[str, str] | None = None,
        maps: Mapping[tuple[str, str], Tensor] | None = None,
        sources: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Evaluate one case and write the results.

        Args:
            evaluator: evaluator with the run's metrics.
            image: the preprocessed image (C, *spatial).
            case: name of the case, as given by the user.
            problems: parts of the case that cannot be used (its label), with reasons, to be recorded.
            maps: maps (C, *spatial) by target and method, see `Evaluator`.
            sources: the files of the case and the options, JSON-ready, to be recorded.
            more: see `Evaluator`.

        Raises:
            EsegetaError: the case cannot be explained at all.
        """
        refuse_link_out(Layout.of(self.output_dir).beside(case, "").parent, self.output_dir)
        check_sources(image, more.get("data"))
        parts = self.ranks.part(self.share, self.methods, self.targets)

        def judge() -> EvaluationResult:
            return EvaluationResult.joined(
                [evaluator(image, some, of, maps=maps, names=self.names, **more) for some, of in parts]
            )

        if self.share == "methods":
            with self.ranks.summed([]):  # a failure here is raised on all ranks
                result = judge()
            result = EvaluationResult.joined(self.ranks.gather(result))
        else:
            result = judge()
        result.failed |= problems or {}
        if self.writes:
            self.write(case, result, sources)

    def failed(self, case: str, reason: str) -> None:
        """Record a case that could not be evaluated at all."""
        if self.writes:
            self.problems.append(f"{case}: {reason}")

    def write(self, case: str, result: EvaluationResult, sources: Mapping[str, Any] | None = None) -> Path:
        """Write one case, with its sources, see `evaluate`, and return the path of its JSON file.

        Raises:
            OutputLost: the output folder was removed during the run.
        """
        if not self.output_dir.is_dir():  # otherwise it would be made again, without the earlier cases
            raise OutputLost(f"{self.output_dir} was removed during the run: run the same command again")
        self.done += 1
        self.problems += [f"{case}: {what}: {why}" for what, why in result.failed.items()]
        for row in result.rows:
            if row["status"] == "failed":
                self.problems.append(f"{case}: {row['target']}, {row['method']}, {row['metric']}: {row['reason']}")
            if row["beats_controls"] is False:
                self.not_beating.append(f"{case}: {row['target']}, {row['method']}, {row['metric']}")
        place = Layout.of(self.output_dir)
        refuse_link_out(place.beside(case, "").parent, self.output_dir)
        region_rows = [{c: row.get(c) for c in REGION_COLUMNS} for row in result.regions]
        _write_text(place.beside(case, "regions.csv"), csv_text(REGION_COLUMNS, region_rows))
        write_json(place.beside(case, "regions.json"), {"case": case, "regions": region_rows})
        rows = [{"case": case, **{c: row.get(c) for c in COLUMNS if c != "case"}} for row in result.rows]
        if self.ranks.rank:
            self._rows.append((case, rows))
        else:
            self._table({case: rows})
        curves = [
            {"target": r["target"], "method": r["method"], "metric": r["metric"], **r["curve"]}
            for r in result.rows
            if r.get("curve")
        ]
        record = {
            **self.provenance,
            "case": case,
            **result.measured_on,
            "sources": dict(sources or {}),
            "metrics": [{k: v for k, v in row.items() if k != "curve"} for row in result.rows],
            "curves": curves,
            "failed": result.failed,
            "empty_targets": result.empty,
            "intended_use": storage.INTENDED_USE,
            "versions": storage.versions(),
        }
        return write_json(place.beside(case, "metrics.json"), json_ready(record))

    def take_summary(self) -> dict[str, Any]:
        """Return, JSON-ready, what has been added to the attributes since the last call, for `restore`."""
        done, problems, worse = self._summarised
        self._summarised = (self.done, len(self.problems), len(self.not_beating))
        return {
            "done": self.done - done,
            "problems": self.problems[problems:],
            "not_beating": self.not_beating[worse:],
        }

    def restore(self, summary: Mapping[str, Any]) -> None:
        """Add a summary that `take_summary` returned in an earlier process of this command."""
        self.done += summary.get("done", 0)
        self.problems += summary.get("problems", [])
        self.not_beating += summary.get("not_beating", [])
        self._summarised = (self.done, len(self.problems), len(self.not_beating))

    def join(self) -> None:
        """Merge the results of all processes: complete the table, and gather `done`, `problems` and `not_beating`."""
        if self.ranks.size == 1:
            return
        known = self.ranks.gather((self.done, self.problems, self.not_beating, self._rows))
        self.done = sum(done for done, *_ in known)
        self.problems = [line for _, lines, _, _ in known for line in lines]
        self.not_beating = [line for _, _, lines, _ in known for line in lines]
        of_others = dict(pair for *_, several in known for pair in several)
        if of_others and not self.ranks.rank:
            self._table(of_others)
        self._rows = []

    def add_rows(self, rows: Mapping[str, list[dict[str, Any]]]) -> None:
        """Add rows of another table, by case; they replace those of the same cases."""
        self._table(rows)

    def _table(self, judged: Mapping[str, list[dict[str, Any]]]) -> None:
        """Replace the rows of these cases in the table; a case may have no rows any more.

        The lock lets several runs write into one table; its file stays, because removing it would let in two at once.
        """
        with self._locked():
            earlier = [row for row in self._earlier() if row["case"] not in judged]
            _write_text(self.path, csv_text(COLUMNS, [*earlier, *(row for rows in judged.values() for row in rows)]))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = FileLock(self.output_dir / LOCK)
        try:
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            raise UsageError(
                f"{self.output_dir / LOCK} cannot be locked ({error}), so several runs could overwrite each other's "
                "rows: choose an output folder on another file system"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def _earlier(self) -> list[dict[str, Any]]:
        """Return the rows of the existing table, see `read_table`."""
        refuse_link_out(self.path, self.output_dir)
        return read_table(self.path)


def read_table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.csv``, also if a spreadsheet has saved it; none if there is no such file.

    Raises:
        UsageError: the file cannot be read, or is another table.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            columns, rows = plain_rows(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read ({error}): move it away, or choose another folder") from error
    if columns is not None and not set(COLUMNS) <= set(columns):
        raise UsageError(f"{path} has other columns than 'evaluate' writes: move it away")
    return rows


def _write_text(path: Path, text: str) -> None:
    with storage.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
