"""Pictures of the page of a cohort: similarity matrix, embedding, slices of maps in the common space."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from PIL import Image

from esegeta_monai.files.pictures.picture import save_picture
from esegeta_monai.files.scans import read_scan
from esegeta_monai.output.cohort.results import FamilyResult

__all__ = ["Dot", "data_url", "dots", "matrix_picture", "similarity_order", "slices"]

BLUE, WHITE, RED = np.array([11.0, 63.0, 209.0]), np.array([255.0, 255.0, 255.0]), np.array([209.0, 18.0, 11.0])
WIDTH, HEIGHT, MARGIN = 560, 400, 18


class Dot:
    """A case in the embedding: position in the picture, name, cluster (0: none), and whether it is an outlier."""

    def __init__(self, x: float, y: float, case: str, cluster: int, outlier: bool) -> None:
        self.x, self.y, self.case, self.cluster, self.outlier = x, y, case, cluster, outlier


def dots(result: FamilyResult, outliers: Sequence[bool]) -> list[Dot]:
    """Return the positions of the cases in a picture of `WIDTH` by `HEIGHT`."""
    points = result.points
    low, size = points.min(0), np.where(np.ptp(points, axis=0) > 0, np.ptp(points, axis=0), 1.0)
    labels = np.zeros(len(points), dtype=int) if result.clusters.labels is None else result.clusters.labels
    scaled = (points - low) / size
    return [
        Dot(
            round(MARGIN + x * (WIDTH - 2 * MARGIN), 1),
            round(HEIGHT - MARGIN - y * (HEIGHT - 2 * MARGIN), 1),
            case,
            int(cluster),
            bool(outlier),
        )
        for (x, y), case, cluster, outlier in zip(scaled.tolist(), result.cases, labels, outliers)
    ]


def similarity_order(result: FamilyResult) -> list[int]:
    """Return the order of cases in the picture of the similarity matrix: by cluster, then along the embedding."""
    labels = np.zeros(len(result.cases)) if result.clusters.labels is None else result.clusters.labels
    return sorted(range(len(result.cases)), key=lambda i: (labels[i], result.points[i].tolist(), result.cases[i]))


def matrix_picture(matrix: np.ndarray) -> str:
    """Return a matrix (n, n) in [−1, 1] as a picture, a data URL: blue for −1, white for 0, red for 1."""
    value = np.clip(matrix, -1, 1)[..., None]
    colours = np.where(value >= 0, WHITE + value * (RED - WHITE), WHITE - value * (BLUE - WHITE))
    zoom = max(1, 480 // len(matrix))
    picture = Image.fromarray(np.round(colours).astype(np.uint8)).resize(
        (zoom * len(matrix), zoom * len(matrix)), Image.Resampling.NEAREST
    )
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return data_url(file.getvalue())


def data_url(png: bytes) -> str:
    """Return a PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def slices(
    path: Path, reference: Path, values: np.ndarray, *, what: str, signed: bool, target: str, method: str, units: str
) -> str:
    """Draw three planes of a map in the common space into a PNG, and return it as a data URL.

    Args:
        path: the PNG.
        reference: image of the common space.
        values: (x, y, z) on its grid.
        what: title, in place of a case.
        signed, target, method, units: see `esegeta_monai.files.pictures.picture.draw_picture`.
    """
    flat = values.shape[2] == 1
    scan = read_scan(reference, spatial_dims=2 if flat else None)
    image = MetaTensor(scan.as_tensor()[:1], affine=scan.affine)
    shown = torch.from_numpy(np.ascontiguousarray(values[..., 0] if flat else values)).float()[None]
    save_picture(path, image, shown, signed=signed, case=what, method=method, target=target, units=units)
    return data_url(path.read_bytes())
