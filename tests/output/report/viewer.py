"""The data of a page, read back without its script."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def data_of(page: Path) -> dict[str, Any]:
    """The JSON that the viewer reads."""
    (text,) = re.findall(r'id="viewer-data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    return json.loads(text)


def volume_of(page: Path, name: str, kind: type = np.int8) -> np.ndarray:
    """A volume (x, y, z) by its id, as whole numbers; a map of more than 127 steps has two bytes each."""
    pattern = rf'id="{name}" data-width="(\d)"( data-delta="1")?>(.*?)</script>'
    result = re.search(pattern, page.read_text(encoding="utf-8"), re.S)
    assert result is not None, name
    width, raw = int(result[1]), zlib.decompress(base64.b64decode(result[3]))
    planes = np.frombuffer(raw, dtype=np.uint8).reshape(width, -1).astype(np.uint16)
    values = sum(planes[byte] << (8 * byte) for byte in range(width)).astype(np.uint8 if width == 1 else np.uint16)
    if result[2]:
        values = np.cumsum(values, dtype=values.dtype)
    signed = np.issubdtype(kind, np.signedinteger)
    values = values.view(np.dtype(f"{'i' if signed else 'u'}{width}"))
    return values.reshape(data_of(page)["size"], order="F")


def values_of(page: Path, entry: dict[str, Any], channel: int = 0) -> np.ndarray:
    """The values (x, y, z) that the steps of a map stand for."""
    steps = volume_of(page, entry["volumes"][channel]).astype(float)
    if not entry["extreme"]:
        return np.zeros(steps.shape)
    return entry["knee"] * np.sinh(steps / entry["levels"] * np.arcsinh(entry["extreme"] / entry["knee"]))


def scan_of(page: Path, channel: int = 0) -> np.ndarray:
    """The intensities (x, y, z) of a channel of the scan."""
    scan = data_of(page)["scan"]
    entry = scan["channels"][channel]
    levels = volume_of(page, entry["id"], np.uint16).astype(float)
    return entry["low"] + levels / scan["levels"] * (entry["high"] - entry["low"])
