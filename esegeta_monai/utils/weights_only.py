"""Checkpoints read without running code that they may hold."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from typing import Any

import torch

__all__ = ["read_weights"]


def read_weights(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Any:
    """Return what ``torch.load(path, weights_only=True)`` returns, without its advice to switch that off.

    Raises:
        pickle.UnpicklingError: the file holds other objects than tensors and numbers, with the first one's name.
        RuntimeError, OSError, EOFError, ValueError, KeyError: as `torch.load`, for missing and damaged files.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"weight": torch.ones(2)}, f"{folder}/a.pt")
    ...     read_weights(f"{folder}/a.pt")
    {'weight': tensor([1., 1.])}
    """
    try:
        with warnings.catch_warnings():
            # the error, if there is one, says more
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            return torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", " ".join(str(error).split()))
        what = f"it refers to {named[1]}, which is code and no weight" if named else "it holds more than weights"
        raise pickle.UnpicklingError(f"{what}; it was not loaded") from error
