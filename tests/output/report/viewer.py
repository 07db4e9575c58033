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
    """A volume (x, y, z) by its id."""
    result = re.search(rf'id="{name}"( data-delta="1")?>(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert result is not None, name
    raw = np.frombuffer(zlib.decompress(base64.b64decode(result[2])), dtype=np.uint8)
    if result[1]:
        raw = np.cumsum(raw, dtype=np.uint8)
    return raw.view(kind).reshape(data_of(page)["size"], order="F")
