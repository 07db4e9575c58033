"""The second stage of nnU-Net's cascade: the first stage's segmentation as further, frozen input channels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from esegeta_monai.errors import InputError, NetworkError, UsageError

__all__ = ["PREVIOUS", "FirstStageInput", "previous_segmentation", "sibling_folder"]

PREVIOUS = "nnunet_previous_stage"
"""Key of the first stage's segmentation (classes, *spatial), one-hot, in the data dictionary."""


class FirstStageInput(nn.Module):
    """A network that reads the first stage's segmentation as ``condition``: ``f(x, s) = network([x, s])``.

    Methods change and explain the image x only; s stays as it is.

    Args:
        network: the network of the second stage.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the output for images (B, C, *spatial) and one-hot segmentations (B, classes, *spatial).

        Raises:
            NetworkError: there is no segmentation.
        """
        if condition is None:
            raise NetworkError(
                "the second stage of a cascade reads the first stage's segmentation: pass "
                "**reader.case_arguments(image, data) to the explainer"
            )
        result: Tensor = self.network(torch.cat([x, condition], 1))
        return result


def sibling_folder(folder: Path, configuration: str) -> Path:
    """Return the folder of another configuration beside a model folder, as ``nnUNetv2_train`` names it.

    Raises:
        UsageError: there is none.
    """
    trainer, _, rest = folder.name.partition("__")
    plans, _, _ = rest.partition("__")
    sibling = folder.with_name(f"{trainer}__{plans}__{configuration}")
    if not sibling.is_dir():
        raise UsageError(
            f"{folder.name} is the second stage of a cascade, and its first stage {sibling.name} is not beside it: "
            "give its model folder, or the folder of its segmentations, by previous=DIR (--previous-stage DIR)"
        )
    return sibling


def previous_segmentation(folder: Path, files: Sequence[str], ending: str) -> Path:
    """Return the first stage's segmentation of a case in a folder that ``nnUNetv2_predict`` wrote.

    Args:
        folder: the folder.
        files: files of the case, ``CASE_0000`` and so on.
        ending: extension of the data set's files.

    Raises:
        InputError: there is none.
    """
    name = Path(files[0]).name.removesuffix(ending).removesuffix("_0000")
    file = folder / f"{name}{ending}"
    if not file.is_file():
        raise InputError(f"{folder.name} has no segmentation '{file.name}' of the first stage")
    return file
