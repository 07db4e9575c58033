"""Log the results of a folder to a run of MLflow or Weights & Biases: maps, pictures, records and figures."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ignite.engine import Events
from monai.handlers import MLFlowHandler
from monai.utils import optional_import

from esegeta_monai.errors import UsageError
from esegeta_monai.files.journal import read_run
from esegeta_monai.files.maps import sidecar_path
from esegeta_monai.output.evaluation_writer import read_table
from esegeta_monai.utils.files import inside, read_json
from esegeta_monai.utils.names import MAP_SUFFIXES
from esegeta_monai.utils.upstream import attached_handlers

__all__ = ["MlflowTracker", "Tracker", "WandbTracker", "figures", "tracked_files", "tracker_of"]

AT_THE_TOP = ("run.json", "metrics.csv", "explanations.csv", "dataset_description.json")
NOT_LOGGED = ("_scan.nii.gz", "_mask.nii.gz")


def tracked_files(folder: Path) -> Iterator[Path]:
    """Yield the files of an output folder that are logged: maps, pictures, records, tables and ``run.json``.

    Copies of scans, masks, DICOM files, reports and logs are not. Pictures show slices of the scan.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("run.json", "a_attr.nii.gz", "a_scan.nii.gz", "a_attr.dcm", "esegeta.log"):
    ...         _ = (Path(folder) / name).write_text("")
    ...     [path.name for path in tracked_files(Path(folder))]
    ['a_attr.nii.gz', 'run.json']
    """
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if not path.is_file() or not inside(path, folder) or any(part.startswith(".") for part in place.parts):
            continue
        wanted = path.name.endswith((*MAP_SUFFIXES, ".png", ".json")) or path.name.endswith("_regions.csv")
        if path.name.endswith(NOT_LOGGED) or (len(place.parts) == 1 and path.suffix in (".json", ".csv")):
            wanted = place.as_posix() in AT_THE_TOP
        if wanted:
            yield path


def figures(folder: Path) -> dict[str, float]:
    """Return the figures of a folder, as means over its cases.

    ``explanation/value/<target>/<method>`` is the score F(x) of the target, ``explanation/<metric>/<target>/<method>``
    a metric of ``metrics.csv``, ``explanation/maps`` and ``explanation/failed`` numbers of results.
    """
    values: dict[str, list[float]] = defaultdict(list)
    counts = {"explanation/maps": 0.0, "explanation/failed": 0.0}
    for entry in read_run(folder).results:
        counts["explanation/failed"] += entry.get("status") in ("failed", "timeout")
        if not entry.get("map"):
            continue
        counts["explanation/maps"] += 1
        value = (read_json(sidecar_path(folder / str(entry["map"]))) or {}).get("value")
        if isinstance(value, (int, float)):
            values[_name("value", entry["target"], entry["method"])].append(float(value))
    for row in read_table(folder / "metrics.csv"):
        if row.get("value"):
            values[_name(row["metric"], row["target"], row["method"])].append(float(row["value"]))
    return {**counts, **{name: sum(several) / len(several) for name, several in values.items()}}


def _name(figure: str, target: str, method: str) -> str:
    """Return the name of a figure with the characters that MLflow allows."""
    parts = (re.sub(r"[^\w .-]", "-", str(part), flags=re.ASCII) for part in (figure, target, method))
    return "/".join(["explanation", *parts])


class Tracker(ABC):
    """A run of a tracking service that results are logged to; a subclass connects another service."""

    def begin(self, engine: Any) -> None:  # noqa: B027 - a service without a run of its own needs none
        """Find the run, at the beginning of an epoch of an engine.

        Raises:
            UsageError: there is none.
        """

    @abstractmethod
    def log(self, folder: str | Path, epoch: int | None = None) -> None:
        """Log the results of an output folder.

        Raises:
            UsageError: the service refuses them.
        """


class MlflowTracker(Tracker):
    """Log to MLflow: files as artifacts under ``explanations/``, figures as metrics with the epoch as step.

    Args:
        client: an ``mlflow.MlflowClient``; None: that of the engine's ``MLFlowHandler`` (``--tracking mlflow`` of
            MONAI's bundles attaches one), else of the active run.
        run_id: run of the client.

    Raises:
        UsageError: MLflow is not installed.

    Example, after a run of the command line::

        MlflowTracker(mlflow.MlflowClient(), run_id).log("out")
    """

    def __init__(self, client: Any = None, run_id: str | None = None) -> None:
        if client is None and not optional_import("mlflow")[1]:
            raise UsageError('logging to MLflow needs it: pip install "esegeta-monai[mlflow]"')
        self.client, self.run_id = client, run_id

    def begin(self, engine: Any) -> None:
        """See `Tracker`."""
        if self.run_id is not None:
            return
        for function in attached_handlers(engine, Events.STARTED):
            handler = getattr(function, "__self__", None)
            if isinstance(handler, MLFlowHandler) and handler.cur_run is not None:
                self.client, self.run_id = handler.client, handler.cur_run.info.run_id
                return
        self._active()

    def _active(self) -> None:
        import mlflow

        run = mlflow.active_run()
        if run is None:
            raise UsageError(
                "track='mlflow': there is no run: add --tracking mlflow to the command of the bundle, attach an "
                "MLFlowHandler, or call mlflow.start_run()"
            )
        self.client, self.run_id = mlflow.MlflowClient(), run.info.run_id

    def log(self, folder: str | Path, epoch: int | None = None) -> None:
        """See `Tracker`."""
        folder = Path(folder)
        if self.run_id is None:
            self._active()
        top = "explanations" if epoch is None else f"explanations/epoch{epoch}"
        try:
            for path in tracked_files(folder):
                place = path.relative_to(folder).parent.as_posix()
                self.client.log_artifact(self.run_id, str(path), top if place == "." else f"{top}/{place}")
            for name, value in figures(folder).items():
                self.client.log_metric(self.run_id, name, value, step=epoch or 0)
        except Exception as error:  # a server may answer anything
            raise UsageError(f"MLflow refuses the results in {folder.name}: {type(error).__name__}: {error}") from error


class WandbTracker(Tracker):
    """Log to Weights & Biases: files as one artifact, pictures as images, figures with the epoch.

    Args:
        run: result of ``wandb.init``; None: the active run.

    Raises:
        UsageError: W&B is not installed.

    Example, after a run of the command line::

        WandbTracker(wandb.init(project="brain", mode="offline")).log("out")
    """

    def __init__(self, run: Any = None) -> None:
        if not optional_import("wandb")[1]:
            raise UsageError('logging to Weights & Biases needs it: pip install "esegeta-monai[wandb]"')
        self.run = run

    def begin(self, engine: Any) -> None:
        """See `Tracker`."""
        import wandb

        self.run = self.run or wandb.run
        if self.run is None:
            raise UsageError("track='wandb': there is no run: call wandb.init() first")

    def log(self, folder: str | Path, epoch: int | None = None) -> None:
        """See `Tracker`."""
        import wandb

        self.begin(None)
        folder = Path(folder)
        try:
            artifact = wandb.Artifact(f"explanations-{self.run.id}", type="explanations")
            logged: dict[str, Any] = dict(figures(folder))
            for path in tracked_files(folder):
                artifact.add_file(str(path), name=path.relative_to(folder).as_posix())
                if path.suffix == ".png":
                    logged[f"explanation/{path.stem}"] = wandb.Image(str(path))
            self.run.log({**logged, **({} if epoch is None else {"epoch": epoch})})
            self.run.log_artifact(artifact)
        except Exception as error:  # a server may answer anything
            raise UsageError(f"W&B refuses the results in {folder.name}: {type(error).__name__}: {error}") from error


def tracker_of(track: str | Tracker | None) -> Tracker | None:
    """Return the tracker of a setting: ``"mlflow"``, ``"wandb"``, a `Tracker` or None.

    Raises:
        UsageError: another setting, or its package is not installed.
    """
    if track is None or isinstance(track, Tracker):
        return track
    kinds: dict[str, type[Tracker]] = {"mlflow": MlflowTracker, "wandb": WandbTracker}
    if track not in kinds:
        raise UsageError(f"track={track!r}: give 'mlflow', 'wandb' or a Tracker")
    return kinds[track]()
