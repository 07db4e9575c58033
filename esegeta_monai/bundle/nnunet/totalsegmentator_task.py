"""A task of TotalSegmentator: its models, its classes and its rough model, read from the installed package."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from esegeta_monai.bundle.nnunet.files import imported
from esegeta_monai.errors import UsageError

__all__ = ["Mode", "PartModel", "TotalSegmentatorTask", "totalsegmentator_module"]

Mode = Literal["default", "fast", "fastest"]
PARTS: Final = {
    "total": ("class_map_5_parts", "map_taskid_to_partname_ct"),
    "total_v3": ("class_map_5_parts_total_v3", "map_taskid_to_partname_ct_v3"),
    "total_mr": ("class_map_parts_mr", "map_taskid_to_partname_mr"),
    "headneck_muscles": ("class_map_parts_headneck_muscles", "map_taskid_to_partname_headneck_muscles"),
}
"""Names in ``totalsegmentator.map_to_binary``, per task of several models: classes by part, and part by number."""
LARGE_STEP: Final = ("total", "total_v3", "total_mr")
"""Tasks whose windows are 0.8 of a window apart, and not half of one."""
ENDING = ".nii.gz"


def totalsegmentator_module(module: str) -> Any:
    """Import a module of totalsegmentator.

    Raises:
        UsageError: it is not installed.
    """
    return imported(module, "tasks of TotalSegmentator", "TotalSegmentator", "totalsegmentator")


@dataclass(frozen=True)
class PartModel:
    """One nnU-Net model of a task.

    Attributes:
        number: number of its data set, such as 291.
        folder: its model folder.
        classes: names of the classes by its own labels, without background.
    """

    number: int
    folder: Path
    classes: dict[int, str]


@dataclass(frozen=True)
class TotalSegmentatorTask:
    """A task of TotalSegmentator.

    Attributes:
        name: such as ``"total"``.
        mode: ``"fast"`` and ``"fastest"`` choose models of a lower resolution, where the task has them.
        config: TotalSegmentator's settings of the task: resampling, crop, folds, trainer.
        classes: names of the classes by the labels of the final file.
        parts: its models, in the order in which TotalSegmentator runs them: later ones overwrite earlier ones.
        rough: the task whose segmentation gives the crop; None: no crop.
    """

    name: str
    mode: Mode
    config: dict[str, Any]
    classes: dict[int, str]
    parts: tuple[PartModel, ...]
    rough: TotalSegmentatorTask | None

    @classmethod
    def read(cls, name: str, mode: Mode = "default", weights: str | Path | None = None) -> TotalSegmentatorTask:
        """Read a task from the installed package and find its weights.

        Args:
            name: the task.
            mode: see the class.
            weights: folder of the weights; None: as TotalSegmentator, ``$TOTALSEG_WEIGHTS_PATH``, or
                ``nnunet/results`` in ``$TOTALSEG_HOME_DIR`` or ``~/.totalsegmentator``.

        Raises:
            UsageError: the package or the weights are missing, there is no such task, or it is not supported.
        """
        maps = totalsegmentator_module("totalsegmentator.map_to_binary")
        config = _config(name, mode)
        if name == "vertebrae_pp_refined" or isinstance(config.get("crop"), str) or config.get("cascade"):
            raise UsageError(f"the task {name} of TotalSegmentator is not supported: its crop or its masks need more")
        folder = _weights(weights)
        numbers = config["task_id"] if isinstance(config["task_id"], list) else [config["task_id"]]
        if isinstance(config["task_id"], list):
            if name not in PARTS:
                raise UsageError(f"the task {name} of TotalSegmentator is not supported: its part models are not known")
            classes_of, part_of = (getattr(maps, attribute) for attribute in PARTS[name])
            labels = [classes_of[part_of[number]] for number in numbers]
        else:
            labels = [maps.class_map[name]]
        parts = tuple(
            PartModel(number, _model_folder(folder, number, config, name, mode), dict(own))
            for number, own in zip(numbers, labels)
        )
        return cls(name, mode, config, dict(maps.class_map[name]), parts, _rough(name, config, weights))

    @property
    def step(self) -> float:
        """Distance of the windows in window sizes."""
        return 0.8 if self.name in LARGE_STEP else 0.5

    @property
    def folders(self) -> list[Path]:
        """All model folders that a prediction reads, also those of the rough model."""
        return [part.folder for part in self.parts] + (self.rough.folders if self.rough else [])

    @property
    def description(self) -> dict[str, Any]:
        """Name, models and classes, JSON-ready."""
        return {
            "name": self.name,
            "mode": self.mode,
            "version": totalsegmentator_module("totalsegmentator.config").get_version(),
            "spacing in mm": self.config["resample"],
            "crop to": None if self.rough is None else ", ".join(self.config["crop"]),
            "step size": self.step,
            **{
                f"model {part.number}": {str(label): name for label, name in part.classes.items()}
                for part in self.parts
            },
        }

    def part_of(self, classes: Iterable[str]) -> PartModel:
        """Return the model that predicts the classes.

        Args:
            classes: names of classes; none: enough for a task of one model.

        Raises:
            UsageError: no such class, classes of different models, or none where there are several models.
        """
        wanted = list(dict.fromkeys(classes))
        known = {name: part for part in self.parts for name in part.classes.values()}
        unknown = [name for name in wanted if name not in known]
        if unknown:
            some = ", ".join(list(known)[:8])
            raise UsageError(
                f"the task {self.name} has no class {', '.join(unknown)}; it has {len(known)}, such as {some}: "
                f"'esegeta-monai info --totalsegmentator {self.name}' lists all"
            )
        chosen = {known[name].number: known[name] for name in wanted}
        if len(chosen) > 1:
            where = ", ".join(f"{name} in {known[name].number}" for name in wanted)
            raise UsageError(f"the classes are in different models of {self.name} ({where}): explain them in two runs")
        if not chosen and len(self.parts) > 1:
            raise UsageError(
                f"the task {self.name} has {len(self.parts)} models: give the class by --target, such as --target "
                f"{next(iter(known))}; 'esegeta-monai info --totalsegmentator {self.name}' lists all"
            )
        return next(iter(chosen.values())) if chosen else self.parts[0]


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield printed


def _config(name: str, mode: Mode) -> dict[str, Any]:
    api = totalsegmentator_module("totalsegmentator.python_api")
    tasks = totalsegmentator_module("totalsegmentator.map_tasks_config").TASK_CONFIGS
    if name not in tasks:
        raise UsageError(f"TotalSegmentator has no task {name}; it has {', '.join(sorted(tasks))}")
    try:
        with _quiet() as printed:
            config: dict[str, Any] = api.get_task_config(
                name, fast=mode == "fast", fastest=mode == "fastest", quiet=True, plans="nnUNetPlans"
            )
    except SystemExit as error:  # the task needs a licence that is not there
        raise UsageError(f"TotalSegmentator refuses {name}: {' '.join(printed.getvalue().split())[:200]}") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    return config


def _weights(folder: str | Path | None) -> Path:
    if folder is None:
        folder = os.environ.get("TOTALSEG_WEIGHTS_PATH")
    if folder is None:
        home = os.environ.get("TOTALSEG_HOME_DIR")
        folder = (Path(home) if home else Path.home() / ".totalsegmentator") / "nnunet" / "results"
    return Path(folder).resolve()


def _model_folder(weights: Path, number: int, config: dict[str, Any], name: str, mode: Mode) -> Path:
    model = f"{config['trainer']}__{config['plans']}__{config['model']}"
    folders = sorted(weights.glob(f"Dataset{number:03d}_*/{model}"))
    if len(folders) != 1:
        what = "several folders" if folders else "no folder"
        task = name if mode == "default" else f"{name}_fast"
        raise UsageError(
            f"{what} Dataset{number:03d}_*/{model} of the task {name} in {weights}: download the weights by "
            f"'totalseg_download_weights -t {task}', or name their folder in TOTALSEG_WEIGHTS_PATH"
        )
    return folders[0]


def _rough(name: str, config: dict[str, Any], weights: str | Path | None) -> TotalSegmentatorTask | None:
    """Return the task that gives the crop, chosen as TotalSegmentator does."""
    crop = config.get("crop")
    if crop is None:
        return None
    if config.get("crop_model") is not None:
        return TotalSegmentatorTask.read(config["crop_model"], "default", weights)
    if "body_trunc" in crop or "body_extremities" in crop:
        return TotalSegmentatorTask.read("body", "fast", weights)
    if name.endswith("_mr"):
        return TotalSegmentatorTask.read("total_mr", "fast", weights)
    return TotalSegmentatorTask.read("total", "fast" if config.get("robust_crop") else "fastest", weights)
