"""The part of a case in the training of each fold of an nnU-Net model, from ``splits_final.json``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from esegeta_monai.utils.files import parse_json

__all__ = ["folds_of_case"]

logger = logging.getLogger("esegeta_monai")

SPLITS: Final = "splits_final.json"


def folds_of_case(folder: Path, case: str) -> dict[str, str]:
    """Return for each fold whether a case was in its training set.

    The splits are read from ``splits_final.json`` in the model folder, in the folder above it, or in
    ``$nnUNet_preprocessed/DATASET``, where nnU-Net writes it.

    Args:
        folder: the model folder with ``fold_0``, ``fold_1``, …
        case: name of the case, with or without nnU-Net's channel number (``_0000``).

    Returns:
        By the name of each fold that is there ``"training"``, ``"validation"`` or ``"not in the splits"``; empty if no
        splits are kinds, so that nothing is known.

    >>> folds_of_case(Path("no such folder"), "case")
    {}
    """
    prepared = os.environ.get("nnUNet_preprocessed")  # noqa: SIM112 - nnU-Net's own spelling
    places = [folder, folder.parent, *([] if prepared is None else [Path(prepared) / folder.parent.name])]
    file = next((place / SPLITS for place in places if (place / SPLITS).is_file()), None)
    if file is None:
        return {}
    try:
        splits = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, so the training set of each fold is not known: %s", file.name, error)
        return {}
    if not isinstance(splits, list) or not all(isinstance(split, dict) for split in splits):
        logger.warning("%s is no list of splits, so the training set of each fold is not known", file.name)
        return {}
    names = {case, case[:-5] if case[-5:-4] == "_" and case[-4:].isdigit() else case}
    known: dict[str, str] = {}
    for number, split in enumerate(splits):
        kinds = [
            kind for key, kind in (("train", "training"), ("val", "validation")) if names & set(split.get(key, ()))
        ]
        known[f"fold_{number}"] = kinds[0] if kinds else "not in the splits"
    known["fold_all"] = "training" if {"training", "validation"} & set(known.values()) else "not in the splits"
    return {name: text for name, text in known.items() if (folder / name).is_dir()}
