"""The scores of a long perturbation run on disk, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.utils.files import atomic

__all__ = ["ScoreTable"]

logger = logging.getLogger("esegeta_monai")

UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What reading a cut or overwritten file raises."""


class ScoreTable:
    """Tables of scores in a folder, one for each set of perturbations that a method scores.

    A table holds the scores so far and how much of the work they stand for. It is written whole, under a temporary name
    first, at most every ``every`` seconds, and when the time limit ends the method; after a kill at most that much is
    lost. A table that cannot be read, or that was made for something else, is named in the log and not used.

    Args:
        folder: made when the first table is written; removed with the last one.
        key: what decides the scores besides the perturbations (image, weights, targets, inferer), JSON-ready.
        every: seconds.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = ScoreTable(Path(folder) / "scores", {"image": "a0"})
    ...     table.write("boxes", torch.ones(1, 3, dtype=torch.float64), 2, force=True)
    ...     found = ScoreTable(Path(folder) / "scores", {"image": "a0"}).read("boxes", (1, 3))
    ...     found[1], ScoreTable(Path(folder) / "scores", {"image": "b1"}).read("boxes", (1, 3)) is None
    (2, True)
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], every: float = 10.0) -> None:
        self.folder, self.every = folder, every
        self.key = json.dumps(key, sort_keys=True)
        self._last = time.monotonic()
        self._files: set[Path] = set()

    def beside(self, **key: Any) -> ScoreTable:
        """Tables in the same folder for the same, but for what more decides the scores."""
        other = copy.copy(self)
        other.key = json.dumps({**json.loads(self.key), **key}, sort_keys=True)
        return other

    def path(self, perturbations: str) -> Path:
        """Where the table of a set of perturbations, named by its hash, lies."""
        return self.folder / f"{hashlib.sha256((self.key + perturbations).encode()).hexdigest()[:24]}.npz"

    def read(self, perturbations: str, shape: tuple[int, ...]) -> tuple[Tensor, int] | None:
        """The scores so far and how much is done; None where there is no table, or one that must not be used."""
        path = self.path(perturbations)
        self._files.add(path)
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
        """Writes a table, where the last one is old enough or ``force`` is given."""
        now = time.monotonic()
        if not done or not (force or now - self._last >= self.every):
            return
        with atomic(self.path(perturbations)) as temporary, open(temporary, "wb") as file:
            np.savez(file, key=np.array(self.key + perturbations), scores=scores.cpu().numpy(), done=np.array(done))
        self._last = now

    @property
    def kept(self) -> bool:
        """Whether a table that was asked for lies on disk."""
        return any(path.exists() for path in self._files)

    def remove(self) -> None:
        """Removes the tables that were asked for: the map is whole."""
        try:
            for path in self._files:
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError as error:  # other tables lie there, of this run or of another process, or it was never made
            logger.debug("%s stays: %s", self.folder.name, error.strerror)
