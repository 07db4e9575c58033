"""Volumes that were read, encoded and packed for one page, kept for the next page of the same files."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

__all__ = ["Memo", "content_key", "file_key"]

T = TypeVar("T")


class Memo:
    """Values by key; the ones that were used longest ago are forgotten.

    Args:
        most: number of values that are kept; 0: none.

    >>> memo = Memo(1)
    >>> [memo.get(key, lambda: key.upper()) for key in ("a", "a", "b")]
    ['A', 'A', 'B']
    >>> list(memo.values)
    ['b']
    """

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self.values: OrderedDict[Hashable, Any] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of a key, made if it is not known; it must not be changed."""
        if key in self.values:
            self.values.move_to_end(key)
            known: T = self.values[key]
            return known
        value = make()
        self.values[key] = value
        while len(self.values) > self.most:
            self.values.popitem(last=False)
        return value


def file_key(path: Path | None) -> Hashable:
    """Return a key that changes when a file is written again; None without a file."""
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino


def content_key(values: np.ndarray) -> Hashable:
    """Return a hash of the numbers, the shape and the type of an array."""
    return hashlib.blake2b(f"{values.shape} {values.dtype}".encode() + values.tobytes(), digest_size=16).digest()
