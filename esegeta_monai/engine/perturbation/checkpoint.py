"""Checkpoints: perturbation scores of a long run on disk, so that a stopped run continues."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.utils.files import atomic

__all__ = ["ScoreCheckpoint"]

logger = logging.getLogger("esegeta_monai")

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""Errors of reading a truncated or overwritten file."""


@dataclass
class _Written:
    """State that all checkpoints of one folder share.

    Attributes:
        last: time of the last write, in seconds.
        files: paths that were read or written.
    """

    last: float = field(default_factory=lambda: time.monotonic())
    files: set[Path] = field(default_factory=set)


class ScoreCheckpoint:
    """Perturbation scores in a folder, one file for each set of perturbations that a method scores.

    A file holds the scores so far and how much of the work they cover. It is written as a whole, under a temporary name
    first, at most every ``every`` seconds and when the time limit ends the method; a kill loses at most that much. A
    file that cannot be read, or that belongs to another run, is named in the log and not used.

    Args:
        folder: made when the first file is written; removed with the last one.
        key: everything that changes a perturbation's score besides the perturbations (image, weights, targets,
            inferer), JSON-ready.
        every: seconds.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint = ScoreCheckpoint(Path(folder) / "scores", {"image": "a0"})
    ...     checkpoint.write("boxes", torch.ones(1, 3, dtype=torch.float64), 2, force=True)
    ...     scores, done = ScoreCheckpoint(Path(folder) / "scores", {"image": "a0"}).read("boxes", (1, 3))
    ...     done, ScoreCheckpoint(Path(folder) / "scores", {"image": "b1"}).read("boxes", (1, 3)) is None
    (2, True)
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], every: float = 10.0) -> None:
        self.folder, self.every = folder, every
        self.key = json.dumps(key, sort_keys=True)
        self._written = _Written()

    def with_key(self, **key: Any) -> ScoreCheckpoint:
        """Return a checkpoint in the same folder whose key has more entries."""
        other = copy.copy(self)
        other.key = json.dumps({**json.loads(self.key), **key}, sort_keys=True)
        return other

    def path(self, perturbations: str) -> Path:
        """Return the path of the scores of a set of perturbations (its hash)."""
        return self.folder / f"{hashlib.sha256((self.key + perturbations).encode()).hexdigest()[:24]}.npz"

    def read(self, perturbations: str, shape: tuple[int, ...]) -> tuple[Tensor, int] | None:
        """Read scores of an earlier run.

        Args:
            perturbations: hash of the set of perturbations.
            shape: shape that the scores must have, (k, m).

        Returns:
            The scores, float64, and how much of the work is done; None where there is no file that may be used.
        """
        path = self.path(perturbations)
        self._written.files.add(path)
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                key, scores, done = str(file["key"]), np.array(file["scores"]), int(file["done"])
        except UNREADABLE as error:
            logger.warning("%s cannot be read (%s): its scores are computed again", path.name, type(error).__name__)
            return None
        if key != self.key + perturbations or scores.shape != shape or scores.dtype != np.float64 or done < 0:
            logger.warning("%s belongs to another run: its scores are computed again", path.name)
            return None
        logger.info("%s: %d steps of an earlier run are not computed again", path.name, done)
        return torch.from_numpy(scores), done

    def write(self, perturbations: str, scores: Tensor, done: int, *, force: bool = False) -> None:
        """Write scores (k, m) if the last write is old enough, or always with ``force``."""
        now = time.monotonic()
        if not done or not (force or now - self._written.last >= self.every):
            return
        with atomic(self.path(perturbations)) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=np.array(self.key + perturbations), scores=scores.cpu().numpy(), done=np.array(done))
        self._written.last = now

    @property
    def stored(self) -> bool:
        """True if a file that was asked for is on disk."""
        return any(path.exists() for path in self._written.files)

    def remove(self) -> None:
        """Remove the files that were asked for; called when the map is complete."""
        try:
            for path in self._written.files:
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError as error:  # the folder holds files of another process or run, or was never made
            logger.debug("%s stays: %s", self.folder.name, error.strerror)
