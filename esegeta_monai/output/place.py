"""Where maps are written: the grid, the check of its contents, and the warnings of resampling."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.errors import InputError
from esegeta_monai.explain.record import Record
from esegeta_monai.files.doubts import geometry_doubts
from esegeta_monai.files.grids.geometry import Geometry
from esegeta_monai.files.grids.probe import Pipeline
from esegeta_monai.files.grids.resample import geometry_of, has_metadata, scan_of
from esegeta_monai.utils.files import read_json

__all__ = ["NO_METADATA", "VANISHED", "ZERO", "PlaceChecks"]

logger = logging.getLogger("esegeta_monai")

NO_METADATA = (
    "the preprocessed image has no metadata (track_meta=False, or NumPy arrays between transforms), so maps are on the "
    "network's grid of {} voxels and not on the scan's: use MONAI's transforms on MetaTensors throughout"
)
ZERO = "the map is zero everywhere on the network's grid"
VANISHED = (
    "the map is zero everywhere on the scan's grid, although it is not on the network's: its voxels lie between those "
    "of the scan, or outside it"
)
OF_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
"""Warnings for programmers, which say nothing about a map."""


class PlaceChecks:
    """The checks of a run that image and scan lie in the same place, once per case and way back to the scan."""

    def __init__(self) -> None:
        self._results: dict[tuple[str, str | None, bool], Geometry] = {}
        self._logged: set[tuple[str, str]] = set()
        self._scans: dict[Path, MetaTensor] = {}

    @staticmethod
    def is_checked(path: Path) -> bool:
        """Return False if a map on the scan's grid was written without the check of its place."""
        record = Record.from_json(read_json(storage.sidecar_path(path)) or {})
        known = {check.get("check") for check in record.checks or ()}
        return "geometry" in known or record.grid != "scan" or record.map is None

    @staticmethod
    def add_doubts(record: Record, scan: Any) -> None:
        """Add what is uncertain in the geometry of a scan (path or MetaTensor) to the warnings of a map's record.

        Raises:
            InputError: the scan's header cannot be read.
        """
        file = scan_of(scan) if isinstance(scan, MetaTensor) else scan
        record.warnings = list(dict.fromkeys([*record.warnings, *geometry_doubts(file)]))

    def check(
        self,
        record: Record,
        case: str,
        image: MetaTensor,
        scan: MetaTensor,
        *,
        additive: bool,
        pipeline: Pipeline | None = None,
    ) -> None:
        """Compare a preprocessed image (C, *spatial) with its scan (C, *scan), and add the result to the record.

        Args:
            record: of a map of this image; its ``image_sha256`` identifies the image.
            additive: see `esegeta_monai.files.grids.resample.to_scan_grid`.
            pipeline: see `esegeta_monai.files.grids.resample.geometry_of`.

        Raises:
            InputError: their contents contradict each other, so a map on the scan's grid would be in the wrong place.
        """
        key = (case, record.image_sha256, additive)
        if key not in self._results:
            self._results[key] = geometry_of(image, scan, additive=additive, pipeline=pipeline)
        result = self._results[key]
        record.checks = [*(record.checks or []), result.entry()]
        if result.verdict == "refused":
            raise InputError(result.text)
        if result.verdict == "warned":
            warnings.warn(result.text, stacklevel=2)  # see `noted`

    def describe(self, record: Record, image: Tensor, *, additive: bool, checks: bool = True) -> None:
        """Add to the record of a map on the network's grid whether it can be brought back to the scan's.

        Args:
            record: of a map of this image.
            image: the preprocessed image (C, *spatial).
            additive: see `esegeta_monai.files.grids.resample.to_scan_grid`.
            checks: also compare the image with the file that it was loaded from, if that still exists.
        """
        with self.noted(record, "image"):
            if not has_metadata(image):
                warnings.warn(NO_METADATA.format("x".join(map(str, image.shape[1:]))), stacklevel=2)
                return
            assert isinstance(image, MetaTensor)
            file = scan_of(image)
            if not checks or file is image:
                return
            try:
                self.add_doubts(record, file)
                self.check(record, "image", image, self._read(file), additive=additive)
            except InputError as error:  # right on the network's grid, or the file cannot be read here
                warnings.warn(f"on the scan's grid this map would not be in its place: {error}", stacklevel=2)

    def _read(self, file: Path) -> MetaTensor:
        if file not in self._scans:
            self._scans = {file: storage.read_scan(file)}
        return self._scans[file]

    @contextmanager
    def noted(self, record: Record, case: str) -> Iterator[None]:
        """Add the warnings that this block raises to a record, and log each once per case."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield
            finally:
                texts = [str(w.message) for w in caught if not issubclass(w.category, OF_CODE)]
                record.warnings = list(dict.fromkeys([*record.warnings, *texts]))
                for text in texts:
                    if (case, text) not in self._logged:
                        self._logged.add((case, text))
                        logger.warning("%s: %s", case, text)
