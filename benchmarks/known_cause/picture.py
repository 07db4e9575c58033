"""Draw one example of each network with maps of some methods, as maximum projections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from causes import Cause, Example
from maps import read_map

__all__ = ["SHOWN", "draw"]

SHOWN = ("LRP", "ExcitationBackprop", "IntegratedGradients", "Saliency", "GradCam", "Occlusion-blur")


def draw(examples: Sequence[tuple[Cause, Example]], file: Path, methods: Sequence[str] = SHOWN) -> None:
    """Draw rows of networks and columns of scan and methods; red: the cause; blue: the unused object."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (1.7 * (len(methods) + 1), 2.1 * len(examples) + 0.5)
    figure, axes = plt.subplots(len(examples), len(methods) + 1, figsize=size, layout="constrained", squeeze=False)
    for row, (cause, example) in zip(axes, examples):
        folder = cause.folder / "maps" / cause.name / str(example.seed)
        image = example.image[0].amax(2).T.numpy()
        for axis, method in zip(row, (None, *methods)):
            axis.imshow(image, cmap="gray", origin="lower", vmax=float(np.quantile(image, 0.999)))
            if method is not None:
                values = read_map(folder / f"{method}.pt")["map"][0].clamp(min=0).amax(2).T.numpy()
                shown = values / values.max() if values.max() > 0 else values
                axis.imshow(shown, cmap="hot", origin="lower", vmin=0, vmax=1, alpha=np.clip(2 * shown, 0, 1))
            for mask, colour in ((example.truth, "red"), (example.other, "deepskyblue")):
                if mask.any():
                    axis.contour(mask[0].amax(2).T.numpy(), [0.5], colors=colour, linewidths=1)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(cause.name)
    for axis, title in zip(axes[0], ("scan", *methods)):
        axis.set_title(title, fontsize=8)
    figure.supxlabel(
        "Axial maximum projections, R at the right; each map's positive part over its greatest value. Red: what the "
        "network answers to; blue: what it does not.\nPainted from MNI152, a population average of skull-stripped "
        "brains. Research only.",
        fontsize=7,
    )
    figure.savefig(file, dpi=100)
    plt.close(figure)
