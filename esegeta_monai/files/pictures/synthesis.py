"""Pictures of synthesised images, and the curve of their objective."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.pictures.picture import _anatomy, _array, _orientation_text
from esegeta_monai.files.pictures.sketch import BAR, DPI, INK, PAPER, Sketch, Window, draw_scan, frame
from esegeta_monai.utils.files import INTENDED_USE, atomic

__all__ = ["save_curve", "save_synthesised"]


def save_synthesised(
    path: str | os.PathLike[str],
    image: torch.Tensor,
    intensity: Sequence[Sequence[float]],
    *,
    case: str,
    method: str,
    subject: str,
    units: str = "intensity",
    channel_names: Sequence[str] | None = None,
    convention: Literal["radiological", "neurological"] = "radiological",
) -> dict[str, Any]:
    """Write a PNG of a synthesised image in grey: three planes through its centre, or one panel in 2D.

    Args:
        path: the PNG, written atomically.
        image: (C, *spatial) in 2D or 3D. A MetaTensor's affine gives letters and proportions.
        intensity: (low, high) per channel, shown as black and white.
        case, method: names to print.
        subject: what it was synthesised for: a class, a layer, a channel.
        units: units of the intensities, for the bar.
        channel_names: names of the channels. The channel with the largest relative spread is shown and named.
        convention: as in `save_picture`.

    Returns:
        Description of the picture, JSON-ready: ``channel``, ``voxel``, ``window`` (level, width), ``convention``.

    Raises:
        InputError: the image is not 2D or 3D, or not every channel has a range.
        UsageError: the convention is unknown.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_synthesised(folder + "/a.png", torch.rand(1, 8, 8), [[0, 1]], case="c", method="DeepDream",
        ...                      subject="layer model.0")["window"]
        [0.5, 1.0]
    """
    if convention not in ("radiological", "neurological"):
        raise UsageError(f"convention is radiological or neurological, not {convention!r}")
    values = _array(image)
    if values.ndim not in (3, 4) or len(intensity) != len(values):
        raise InputError(f"an image to draw is (C, *spatial) with one range per channel, got {values.shape}")
    flat = values.ndim == 3
    anatomy, oriented = _anatomy(image, values)
    values = values[..., None] if flat else values
    spread = [float(v.std()) / (high - low) for v, (low, high) in zip(values, intensity)]
    shown = int(np.argmax(spread))
    low, high = (float(v) for v in intensity[shown])
    grey = Window((low + high) / 2, high - low, "the network's intensities")
    voxel = tuple(n // 2 for n in values.shape[1:])
    planes = anatomy.planes(radiological=convention == "radiological" and oriented)

    heading = [f"{method}: {subject}", f"synthesised for the network, not a scan  ·  case {case}"]
    if len(values) > 1 or channel_names:
        heading[1] += f"  ·  channel {shown}" + (f" ({channel_names[shown]})" if channel_names else "")
    through = "" if flat else f"planes through voxel ({', '.join(map(str, voxel))}), the centre of the image; "
    footing = [
        f"{through}black {low:.4g}, white {high:.4g} ({grey.origin})",
        _orientation_text(anatomy, convention) if oriented else "orientation unknown: the image has no world affine",
        INTENDED_USE,
    ]
    sketch = Sketch([anatomy.extent(plane) for plane in planes], heading, footing, None, INK)
    for axes, plane in zip(sketch.panels, planes):
        draw_scan(axes, anatomy.cut(values[shown], voxel, plane), grey, anatomy.extent(plane))
        frame(axes, plane, plane.name if oriented else "", oriented)
    _bar(sketch, low, high, units)
    sketch.save(Path(path))
    return {
        "channel": shown,
        "voxel": list(voxel[: 2 if flat else 3]),
        "window": [grey.level, grey.width],
        "convention": convention if oriented else None,
    }


def _bar(sketch: Sketch, low: float, high: float, units: str) -> None:
    tall = min(sketch._tall, 2.8)
    axes = sketch._axes(sketch.width - BAR + 0.1, sketch._centre - tall / 2, 0.18, tall)
    axes.imshow(np.linspace(low, high, 256)[:, None], cmap="gray", origin="lower", extent=(0, 1, low, high))
    axes.set_aspect("auto")
    axes.yaxis.tick_right()
    axes.set(xticks=())
    axes.set_yticks([low, (low + high) / 2, high], [f"{v:.3g}" for v in (low, (low + high) / 2, high)])
    axes.tick_params(labelsize=9, colors=INK, length=3)
    axes.set_title(textwrap.fill(units, 18), size=9, color=INK, loc="left", parse_math=False)


def save_curve(path: str | os.PathLike[str], curve: Sequence[float], *, title: str, label: str) -> None:
    """Write a PNG of a curve over steps.

    Args:
        path: the PNG, written atomically.
        curve: one value per step.
        title, label: title of the picture, label of the values.
    """
    figure = Figure(figsize=(6.5, 3.4), dpi=DPI, facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(range(1, len(curve) + 1), curve, color="#0b3fd1", linewidth=1.4)
    axes.set_title(textwrap.fill(title, 70), size=10, color=INK, loc="left", parse_math=False)
    axes.set_xlabel("step", size=9, color=INK)
    axes.set_ylabel(textwrap.fill(label, 40), size=9, color=INK, parse_math=False)
    axes.tick_params(labelsize=8, colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Description": INTENDED_USE, "Software": None})
