"""Record how explanations change during training: scalars and pictures in TensorBoard, and a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.utils import CommonKeys, optional_import
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.names import ResultNames
from esegeta_monai.metrics import MetricInput, RelevanceMass
from esegeta_monai.metrics.randomisation import similarity
from esegeta_monai.utils.csv_text import csv_text, plain_rows
from esegeta_monai.utils.files import atomic
from esegeta_monai.utils.types import flag

__all__ = ["TABLE", "ExplanationSeries"]

TABLE = "explanations.csv"
COLUMNS = ("epoch", "case", "target", "method", "value", "relevance_mass", "similarity", "status")

Key = tuple[str, str, str]


class ExplanationSeries:
    """Time series of the explanations of an `ExplanationHandler` over epochs.

    It has for every epoch, case, target and method:

    * ``value``: F(x), the score of the target;
    * ``relevance_mass``: ``Σ_{v in label} |a_v| / Σ_v |a_v|``, the share of the map's magnitude inside the reference
      region (label above 0), 0 to 1; empty if the data have none;
    * ``similarity``: Spearman's rank correlation of |a| with the last epoch's map of the same case, over the voxels
      where one of them is not zero, -1 to 1; empty if that map has another grid.

    They are written to ``explanations.csv`` in the handler's output folder (the part of its path before ``{epoch}``).
    TensorBoard gets the mean over the epoch's cases as ``explanation/<figure>/<target>/<method>``, and each case's
    picture as ``explanation/<case>/<target>/<method>``.

    Args:
        summary_writer: writer of TensorBoard; None: a writer for ``log_dir`` is created, as in MONAI's handlers.
        log_dir: folder of TensorBoard; MONAI's default is ``./runs``.
        label_key: key of the reference region in the case's data.
        tensorboard: False writes the table only.

    Raises:
        UsageError: TensorBoard is requested but not installed.

    Example::

        series = ExplanationSeries(log_dir="runs")
        ExplanationHandler(methods=["GradCam"], targets=["ClassScore(1)"], output_dir="seen/epoch{epoch:03d}",
                           series=series).attach(evaluator)
    """

    def __init__(
        self,
        summary_writer: Any = None,
        log_dir: str | Path = "./runs",
        *,
        label_key: str = CommonKeys.LABEL,
        tensorboard: bool = True,
    ) -> None:
        self.label_key, self._log_dir = label_key, str(log_dir)
        self._writer, self._tensorboard = summary_writer, flag("tensorboard", tensorboard)
        if self._tensorboard and summary_writer is None and not optional_import("torch.utils.tensorboard")[1]:
            raise UsageError(
                "the series is written to TensorBoard, which is not installed: pip install tensorboard, or set "
                "tensorboard=False"
            )
        self._last: dict[Key, Tensor] = {}
        self._rows: list[dict[str, Any]] = []

    def add(
        self,
        attribution: Attribution,
        case: str,
        epoch: int,
        data: Mapping[str, Any],
        picture: Path | None = None,
        names: ResultNames | None = None,
    ) -> None:
        """Add an attribution of an epoch.

        Args:
            attribution: attribution on the network's grid.
            case: name of the case.
            epoch: number of the epoch, from 1.
            data: the case's data, which may contain the reference region.
            picture: PNG of the map.
            names: names of the run, which distinguish methods and targets of the same kind.
        """
        name, target = attribution.method.name or type(attribution.method).__name__, attribution.label
        if names is not None:
            name, target = names.method(attribution.method), names.target(attribution.target, target)
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row.update(epoch=epoch, case=case, target=target, method=name, status=attribution.status)
        row["value"] = attribution.record.get("value")
        if attribution.map is not None:
            magnitude = attribution.map.as_tensor().detach().abs().sum(0).double().cpu()
            row["relevance_mass"] = self._mass(magnitude, data.get(self.label_key))
            row["similarity"] = self._similarity((case, target, name), magnitude)
        self._rows.append(row)
        if picture is not None and self._tensorboard and picture.is_file():
            from PIL import Image

            with Image.open(picture) as image:
                pixels = np.asarray(image.convert("RGB"))
            tag = f"explanation/{case}/{target}/{name}"
            self._board.add_image(tag, pixels, epoch, dataformats="HWC")

    def close_epoch(self, epoch: int, folder: Path) -> None:
        """Append the rows of the epoch to ``folder/explanations.csv``, and write means to TensorBoard."""
        rows, self._rows = self._rows, []
        if not rows:
            return
        self._append(folder / TABLE, rows)
        if not self._tensorboard:
            return
        means: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            for figure in ("value", "relevance_mass", "similarity"):
                if row[figure] is not None:
                    means[f"explanation/{figure}/{row['target']}/{row['method']}"].append(row[figure])
        for tag, values in means.items():
            self._board.add_scalar(tag, float(np.mean(values)), epoch)
        self._board.flush()

    @property
    def _board(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._log_dir)
        return self._writer

    @staticmethod
    def _mass(magnitude: Tensor, label: Any) -> float | None:
        if not isinstance(label, Tensor) or not bool(magnitude.any()):
            return None
        inside = torch.as_tensor(label).as_subclass(Tensor).cpu() > 0
        while inside.ndim > magnitude.ndim:
            inside = inside.any(0)
        if inside.shape != magnitude.shape or not bool(inside.any()):  # a class label, another grid, or no region
            return None
        return RelevanceMass().update(MetricInput(magnitude[None], label=inside)).value

    def _similarity(self, key: Key, magnitude: Tensor) -> float | None:
        before, self._last[key] = self._last.get(key), magnitude
        if before is None or before.shape != magnitude.shape or not bool(before.any()) or not bool(magnitude.any()):
            return None
        return similarity(before[None], magnitude[None])

    def _append(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Add rows to the table by rewriting it atomically; rows of earlier runs are kept unless they are repeated."""
        kept: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                _, kept = plain_rows(file)
        again = {(str(r["epoch"]), r["case"], r["target"], r["method"]) for r in rows}
        kept = [r for r in kept if (r["epoch"], r["case"], r["target"], r["method"]) not in again]
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(csv_text(COLUMNS, [*kept, *rows]), encoding="utf-8")
