"""Maps on disk: their names, their voxel grid, their sidecars, the record of a run, and the scans they explain.

Knows numpy, nibabel and MONAI only; it takes plain arguments, so every door can use it.

    names.py    <output>/<case>/<case>_<target>_<Method>_attr.nii.gz, safe, readable, never twice
    dicom.py    whether a folder holds one whole DICOM series
    scans.py    reading a scan and refusing a bad one; the `Grid` its voxels lie on
    maps.py     a map on that grid, as NIfTI or in the scan's format, its sidecar, and whether both are finished
    runs.py     run.json: what became of every case, target and method
    files.py    atomic writing, strict JSON, checksums
"""

from __future__ import annotations

from esegeta_monai.files.maps import (
    curve_path,
    is_complete,
    picture_path,
    save_map,
    save_sidecar,
    sidecar_path,
    table_path,
)
from esegeta_monai.files.runs import STATUSES, RunRecord
from esegeta_monai.files.scans import Grid, read_scan
from esegeta_monai.utils.files import INTENDED_USE, atomic, sha256_file, versions, writable_folder
from esegeta_monai.utils.images import check_image
from esegeta_monai.utils.names import case_name, check_clashes, distinct_names, map_path, map_suffix, safe_name

__all__ = [
    "INTENDED_USE",
    "STATUSES",
    "Grid",
    "RunRecord",
    "atomic",
    "case_name",
    "check_clashes",
    "check_image",
    "curve_path",
    "distinct_names",
    "is_complete",
    "map_path",
    "map_suffix",
    "picture_path",
    "read_scan",
    "safe_name",
    "save_map",
    "save_sidecar",
    "sha256_file",
    "sidecar_path",
    "table_path",
    "versions",
    "writable_folder",
]
