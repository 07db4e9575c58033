"""The files of an nnU-Net model folder, and modules of nnunetv2."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.utils.files import parse_json
from esegeta_monai.utils.weights_only import read_weights

__all__ = [
    "CHECKPOINT",
    "PROPERTIES",
    "check_single",
    "imported",
    "is_nnunet_folder",
    "nnunet_module",
    "read_checkpoint",
    "read_object",
]

CHECKPOINT = "checkpoint_final.pth"
PROPERTIES = "nnunet_properties"
"""Key of nnU-Net's properties of a case in the data dictionary."""


def is_nnunet_folder(folder: str | Path) -> bool:
    """Return True if a folder has the plans, data set description and a fold of a trained nnU-Net v2 model."""
    root = Path(folder)
    return (root / "plans.json").is_file() and (root / "dataset.json").is_file() and any(root.glob("fold_*"))


def check_single(folder: Path) -> None:
    """Refuse a folder that is none, or that holds several models, such as the weights of TotalSegmentator.

    Raises:
        UsageError: it is no folder of one model; the message lists the models in it.
    """
    if not folder.is_dir():
        raise UsageError(f"no nnU-Net folder at {folder}: there is no such folder")
    if (folder / "plans.json").is_file():
        return
    inside = [
        file.parent.relative_to(folder).as_posix()
        for depth in ("*", "*/*")
        for file in sorted(folder.glob(f"{depth}/plans.json"))
    ]
    if inside:
        more = f" and {len(inside) - 6} more" if len(inside) > 6 else ""
        raise UsageError(
            f"{folder.name} holds several nnU-Net models: give the folder of one, {', '.join(inside[:6])}{more}"
        )


def nnunet_module(module: str) -> Any:
    """Import a module of nnunetv2.

    Raises:
        UsageError: it is not installed.
    """
    return imported(module, "nnU-Net folders", "nnunetv2", "nnunet")


def imported(module: str, need: str, package: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        module: its name.
        need: what needs the package, in words.
        package: name of the package.
        extra: the extra of this package that installs it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{need} need the package {package} ({error}): pip install 'esegeta-monai[{extra}]'"
        ) from error


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: there is no such file, or it is no JSON object.
    """
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file.parent.name}/{file.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file.parent.name}/{file.name} must contain a JSON object")
    return content


def read_checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold.

    Raises:
        NetworkError: it holds other objects than weights and numbers, or is damaged.
    """
    allowed: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")}]
    scalar = np.float64(0).__reduce__()[0]
    rebuild = np.zeros(1).__reduce__()[0]
    for function, name in ((scalar, "scalar"), (rebuild, "_reconstruct")):
        allowed += [(function, f"{module}.multiarray.{name}") for module in ("numpy.core", "numpy._core")]
    try:
        with torch.serialization.safe_globals(allowed):
            state = read_weights(file)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise NetworkError(f"{file.parent.name}/{file.name} cannot be read as weights: {reason[:200]}") from error
    if not isinstance(state, dict) or not {"network_weights", "trainer_name", "init_args"} <= set(state):
        raise NetworkError(f"{file.parent.name}/{file.name} is no checkpoint of nnU-Net v2")
    return state
