"""Output folders with given maps, as ``explain`` writes them, without a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from esegeta_monai.utils.files import sha256_file
from esegeta_monai.utils.names import safe_name

TARGET, METHOD = "ClassScore-lesion", "InputXGradient"


def write_run(
    folder: Path,
    maps: Mapping[str, np.ndarray],
    affines: Mapping[str, np.ndarray] | np.ndarray | None = None,
    masks: Mapping[str, np.ndarray] | None = None,
    *,
    failed: Mapping[str, str] | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """A folder with one map (x, y, z) per case; ``failed`` are cases with a reason and no map."""
    results: list[dict[str, Any]] = []
    for case, values in maps.items():
        affine = affines.get(case) if isinstance(affines, Mapping) else affines
        affine = np.eye(4) if affine is None else affine
        stem = f"{safe_name(case)}_{safe_name(TARGET)}_{safe_name(METHOD)}_attr"
        own = folder / safe_name(case)
        own.mkdir(parents=True, exist_ok=True)
        path = own / f"{stem}.nii.gz"
        nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
        record: dict[str, Any] = {"case": case, "method": METHOD, "method_name": METHOD, "target_name": TARGET}
        record |= {"status": "ok", "map": path.name, "map_sha256": sha256_file(path), "signed": True}
        record |= {"result": {"target": TARGET, "method": METHOD}, "produces": "input map", "value": 1.0}
        if masks is not None:
            mask = own / f"{safe_name(case)}_{safe_name(TARGET)}_mask.nii.gz"
            nib.save(nib.Nifti1Image(masks[case].astype(np.uint8), affine), mask)
            record |= {"display": {"mask": mask.name}, "target_voxels": int(masks[case].sum())}
        else:
            record |= {"predicted_class": 1}
        record |= dict((records or {}).get(case, {}))
        (own / f"{stem}.json").write_text(json.dumps(record), encoding="utf-8")
        relative = path.relative_to(folder).as_posix()
        results.append({"case": case, "target": TARGET, "method": METHOD, "status": "ok", "map": relative})
    for case, reason in (failed or {}).items():
        results.append({"case": case, "target": TARGET, "method": METHOD, "status": "failed", "reason": reason})
    (folder / "run.json").write_text(json.dumps({"results": results}), encoding="utf-8")
    return folder
