"""The contents of a trained nnU-Net model folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from esegeta_monai.bundle.nnunet.files import check_single, nnunet_module, read_checkpoint, read_object
from esegeta_monai.errors import UsageError

__all__ = ["NnunetModel"]


@dataclass(frozen=True)
class NnunetModel:
    """Plans, data set description and weights of a model folder, as objects of nnunetv2.

    Attributes:
        folder: the model folder.
        checkpoints: the file of each fold.
        dataset: content of dataset.json.
        plans, configuration, labels: nnU-Net's managers of plans, configuration and labels.
        configuration_name: such as ``"3d_fullres"``.
        trainer: name of the trainer's class.
        members: weights of each fold.
        mirror_axes: axes that the first fold's checkpoint allows to mirror.
    """

    folder: Path
    checkpoints: tuple[Path, ...]
    dataset: dict[str, Any]
    plans: Any
    configuration: Any
    configuration_name: str
    labels: Any
    trainer: str
    members: tuple[dict[str, Tensor], ...]
    mirror_axes: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path, folds: Sequence[int] | str | None, checkpoint: str) -> NnunetModel:
        """Read a model folder.

        Args:
            folder: the folder.
            folds: numbers of the folds, or ``"all"``; None: all that are there.
            checkpoint: file name of the checkpoints.

        Raises:
            UsageError: no such folder, fold or checkpoint; damaged files; nnunetv2 is not installed.
            NetworkError: a checkpoint holds code.
        """
        check_single(folder)
        plans, dataset = read_object(folder / "plans.json"), read_object(folder / "dataset.json")
        checkpoints = _checkpoints(folder, folds, checkpoint)
        manager_class = nnunet_module("nnunetv2.utilities.plans_handling.plans_handler").PlansManager
        states = [read_checkpoint(file) for file in checkpoints]
        try:
            manager = manager_class(plans)
            name = states[0]["init_args"]["configuration"]
            return cls(
                folder=folder,
                checkpoints=tuple(checkpoints),
                dataset=dataset,
                plans=manager,
                configuration=manager.get_configuration(name),
                configuration_name=name,
                labels=manager.get_label_manager(dataset),
                trainer=states[0]["trainer_name"],
                members=tuple(state["network_weights"] for state in states),
                mirror_axes=tuple(states[0].get("inference_allowed_mirroring_axes") or ()),
            )
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, AssertionError) as error:
            raise UsageError(
                f"{folder.name}: plans.json, dataset.json and checkpoints do not fit each other or are "
                f"incomplete ({type(error).__name__}: {error})"
            ) from error

    @property
    def patch(self) -> tuple[int, ...]:
        """Shape of a window: two numbers for a 2D configuration."""
        return tuple(int(n) for n in self.configuration.patch_size)

    @property
    def channel_names(self) -> dict[str, str]:
        """Names of the image channels by number."""
        return dict(self.dataset.get("channel_names") or self.dataset.get("modality") or {})

    @property
    def class_names(self) -> list[str]:
        """Names of the output channels: regions in the order of dataset.json, or classes."""
        labels = self.dataset["labels"]
        if self.labels.has_regions:
            return [name for name, label in labels.items() if name != "ignore" and label not in (0, [0])]
        return [name for name, label in sorted(labels.items(), key=lambda item: item[1]) if name != "ignore"]


def _checkpoints(folder: Path, folds: Sequence[int] | str | None, name: str) -> list[Path]:
    there = {file.parent.name.removeprefix("fold_"): file for file in sorted(folder.glob(f"fold_*/{name}"))}
    if folds is None:
        wanted = [fold for fold in there if fold != "all"] or list(there)
    else:
        wanted = [folds] if isinstance(folds, str) else [str(fold) for fold in folds]
    missing = [fold for fold in wanted if fold not in there]
    if missing or not wanted:
        raise UsageError(
            f"{folder.name} has no {name} in fold {', '.join(missing) or '0'}; there are folds: "
            f"{', '.join(there) or 'none'}"
        )
    return [there[fold] for fold in wanted]
