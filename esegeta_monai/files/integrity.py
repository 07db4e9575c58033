"""Check that the files of an output folder are those that ``explain`` wrote there, before they are used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esegeta_monai.errors import InputError
from esegeta_monai.files.maps import sidecar_path
from esegeta_monai.utils.files import inside, sha256_file

__all__ = ["checked_map", "checked_neighbour"]


def checked_map(sidecar: Path, record: Mapping[str, Any], folder: str | os.PathLike[str]) -> Path:
    """Return the map that a sidecar describes, after a check that it is that map.

    A sidecar may come from elsewhere: a map of another patient, or any other file, must not be read in its name. So the
    map must lie beside its sidecar, under the name that belongs to it, and have the recorded SHA-256.

    Args:
        sidecar: path of the sidecar.
        record: its entries; ``map`` and ``map_sha256`` are used.
        folder: the output folder; links that lead out of it are refused.

    Raises:
        InputError: the map is missing, lies elsewhere, has no checksum, or was changed after it had been written.
    """
    name = record.get("map")
    path = checked_neighbour(sidecar, name, folder)
    again = "run 'explain' again with --overwrite"
    if sidecar_path(path) != sidecar:
        raise InputError(f"{sidecar.name} names {name!r}, which is not its own map: {again}")
    if not path.is_file():
        raise InputError(f"{path.name} is missing: {again}")
    if not record.get("map_sha256"):
        raise InputError(f"{sidecar.name} has no SHA-256 of its map, so it cannot be checked: {again}")
    if sha256_file(path) != record["map_sha256"]:
        raise InputError(f"{path.name} was altered: its SHA-256 is not the one in {sidecar.name}: {again}")
    return path


def checked_neighbour(sidecar: Path, name: Any, folder: str | os.PathLike[str]) -> Path:
    """Return the path of a file that lies beside a sidecar.

    Args:
        sidecar: path of the sidecar.
        name: the file's name, as the sidecar gives it.
        folder: the output folder.

    Raises:
        InputError: it is no plain file name, or a link leads out of the sidecar's own folder.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or "\\" in name or "\0" in name or Path(name).name != name:
        raise InputError(f"{sidecar.name} names the file {name!r}: only files beside it are read")
    path = sidecar.parent / name
    if not inside(sidecar, folder) or not inside(path, sidecar.parent):
        raise InputError(f"{sidecar.name} or {name!r} is a link to another folder and is not read")
    return path
