"""Scans, maps, sidecars, pictures and run records on disk.

This package depends on numpy, nibabel and MONAI only and takes plain arguments, so every interface can use it.

    scans.py     read and check a scan; the voxel `Grid` of a file
    doubts.py    what is uncertain in the geometry of a scan
    dicom.py     check that a folder has one complete DICOM series
    maps.py      write a map (NIfTI or the scan's format) and its sidecar; check that both are finished
    layout.py    where the files of a case lie: the plain layout, or BIDS derivatives
    runs.py      run.json: the status of every case, target and method
    journal.py   run.jsonl: one line per result, from which run.json is made
    copies.py    copy of the scan and target masks, for the report
    privacy.py   remove paths and names of scans from text
    grids/       resample maps between the network's grid and the scan's
    pictures/    PNG files of maps and synthesised images

Safe file names are in `esegeta_monai.utils.names`, atomic writing and checksums in `esegeta_monai.utils.files`.
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
from esegeta_monai.utils.images import check_contents, check_image
from esegeta_monai.utils.names import case_name, check_clashes, distinct_names, map_path, map_suffix, safe_name

__all__ = [
    "INTENDED_USE",
    "STATUSES",
    "Grid",
    "RunRecord",
    "atomic",
    "case_name",
    "check_clashes",
    "check_contents",
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
