"""Compute maps of every method on every example and keep them on disk, so that a run can be continued."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from causes import Cause, Example

from esegeta_monai import Explainer
from esegeta_monai.methods import Method
from esegeta_monai.targets import ClassScore

__all__ = ["compute_maps", "read_map"]

#: The logit of "lesion", which every method can explain.
TARGET = ClassScore(1)


def compute_maps(cause: Cause, example: Example, methods: Sequence[Method]) -> Iterator[tuple[str, Path]]:
    """Yield a file for each method, with the map (None if there is none) and its record."""
    folder = cause.folder / "maps" / cause.name / str(example.seed)
    folder.mkdir(parents=True, exist_ok=True)
    files = {method.name: folder / f"{method.name}.pt" for method in methods}
    missing = [method for method in methods if not files[method.name].exists()]
    if missing:
        explainer = Explainer(cause.network, on_error="record", window_batch=8)
        for attribution in explainer(example.image[None], methods=missing, targets=[TARGET]):
            path = files[attribution.method.name]
            plain = None if attribution.map is None else attribution.map.as_subclass(torch.Tensor).float()
            part = path.with_suffix(".part")
            torch.save({"map": plain, "record": _plain(attribution.record)}, part)
            os.replace(part, path)
    yield from files.items()


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a record that the table needs: status and cost."""
    keys = ("status", "reason", "seconds", "peak_memory_bytes", "completeness_gap", "layer", "areas_found", "warnings")
    return {key: record[key] for key in keys if key in record}


def read_map(path: Path) -> dict[str, Any]:
    """Read ``map`` (C, *spatial) or None, and ``record``."""
    return torch.load(path, weights_only=True)
