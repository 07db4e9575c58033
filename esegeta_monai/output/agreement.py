"""Write beside a map how far the members of an ensemble and its mirrored views agree on it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

from monai.data import MetaTensor

import esegeta_monai.files as storage
from esegeta_monai.explain.agreement import DDOF, spread
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.record import Record
from esegeta_monai.files.grids.resample import to_scan_grid
from esegeta_monai.files.maps import spread_path
from esegeta_monai.utils.files import read_json

__all__ = ["has_agreement", "remove_spread", "write_spread"]


def has_agreement(path: Path, attribution: Attribution) -> bool:
    """Return True if a finished map has all that is to be compared, or nothing is.

    Args:
        path: the map's path.
        attribution: attribution without a map, with the record of what would be computed.
    """
    wanted = (attribution.record.get("agreement") or {}).get("of", [])
    record = read_json(storage.sidecar_path(path)) or {}
    written = record.get("agreement") or {}
    empty = record.get("status") == "empty_target"
    return empty or all(
        "failed" in written.get(k, {}) or ("map" in written.get(k, {}) and spread_path(path, k).is_file())
        for k in wanted
    )


def remove_spread(path: Path) -> None:
    """Remove the files of an earlier run beside a map."""
    for kind in DDOF:
        spread_path(path, kind).unlink(missing_ok=True)


def write_spread(
    path: Path, attribution: Attribution, record: Record, scan: MetaTensor, grid: storage.Grid
) -> dict[str, Any]:
    """Write the standard deviation over members and over views on the scan's grid, beside the map.

    Each map is brought to the scan's grid as the ensemble's own is; the deviation is taken there.

    Args:
        path: the map's path.
        attribution: with the maps (C, *spatial) of members and views.
        record: its record.
        scan: the scan (C, *scan).
        grid: the scan's grid.

    Returns:
        The entry ``agreement`` of the record with the file names; {} if nothing was compared.
    """
    remove_spread(path)
    maps = attribution.agreement
    if maps is None or record.agreement is None:
        return {}
    entry = dict(record.agreement)
    for kind in DDOF:
        if not maps.of(kind):
            continue
        with warnings.catch_warnings():  # the map itself has given them
            warnings.simplefilter("ignore")
            on_scan = [
                to_scan_grid(cast(MetaTensor, m.cpu()), scan, additive=attribution.method.additive)[0]
                for m in maps.of(kind)
            ]
        beside = spread_path(path, kind)
        storage.save_map(beside, spread(on_scan, kind), grid, method=f"sd over {kind}")
        entry[kind] = {**entry.get(kind, {}), "map": beside.name}
    return {"agreement": entry}
