"""Features: parts of an image that perturbations switch off and on as a whole.

Given as text (``"grid(size=16)"``, ``"supervoxels(n_segments=80)"``, ``"channels"``), a label map (a NIfTI file, a key
of the data dictionary or a tensor), or one of the classes here.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.labels import label_on_grid
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import EsegetaError, InputError, UsageError
from esegeta_monai.utils.csv_text import csv_text
from esegeta_monai.utils.registry import Configurable, Registry

__all__ = ["FEATURES", "Channels", "FeatureSpec", "Features", "Grid", "LabelMap", "Supervoxels", "features_for"]
__all__ += ["foreground", "table_csv"]


@dataclass(frozen=True)
class Features:
    """n features of one image.

    Attributes:
        labels: number of each voxel's feature, 0 … n−1, or −1 for voxels that belong to none and are never changed:
            (1, *spatial) for all channels together, else (C, *spatial).
        names: one name per feature.
    """

    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Number of entries of `labels` per feature, (n,)."""
        return torch.bincount(self.labels.flatten() + 1, minlength=len(self) + 1)[1:]

    def paint(self, values: Tensor) -> Tensor:
        """Assign feature values (k, n) to all their voxels: (k, 1 or C, *spatial), zero outside all features."""
        padded = torch.cat([values.new_zeros(len(values), 1), values], 1).to(self.labels.device)
        entries = (self.labels + 1).flatten()
        painted = padded.new_empty((len(padded), len(entries)))
        for row, out in zip(padded, painted):
            torch.index_select(row, 0, entries, out=out)
        return painted.view(-1, *self.labels.shape)

    def spread(self, values: Tensor) -> Tensor:
        """Divide feature values (k, n) equally among their voxels, so that the sum of the map is that of the values.

        Returns:
            (k, 1 or C, *spatial), zero outside all features.
        """
        return self.paint(values / self.counts.to(values).clamp(min=1))

    def table(self, values: Tensor, **more: Tensor) -> list[list[dict[str, Any]]]:
        """Return a table per target with one row per feature: name, value, voxels, and further columns.

        Args:
            values: (k, n).
            more: further columns (k, n) by title.
        """
        counts = self.counts.tolist()
        return [
            [
                {"feature": n, "value": float(values[k, j]), "voxels": counts[j]}
                | {title: float(column[k, j]) for title, column in more.items()}
                for j, n in enumerate(self.names)
            ]
            for k in range(len(values))
        ]


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    r"""Format a feature table (an entry of a record) as CSV text.

    >>> table_csv([{"feature": "liver", "value": 0.5}])
    'feature,value\nliver,0.5\n'
    """
    return csv_text(list(rows[0]) if rows else ["feature", "value"], rows)


class FeatureSpec(Configurable, ABC):
    """A rule that divides the image of a case into features."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FEATURES.register(cls, *cls.__dict__.get("aliases", ()))

    @abstractmethod
    def of(self, objective: Objective) -> Features:
        """Return the features of the objective's image; equal at every call."""


FEATURES: Registry[FeatureSpec] = Registry(
    "kind of features", FeatureSpec, "esegeta_monai.engine.feature_masks", command=False
)


class Grid(FeatureSpec):
    """Boxes that tile the image, named by their first voxel.

    Args:
        size: size of a box in voxels; one number for all axes, or one per axis.
        per_channel: True: the boxes of each channel are separate features.
    """

    size: int | Sequence[int] = 16
    per_channel: bool = False

    def of(self, objective: Objective) -> Features:
        shape = objective.plan.spatial_shape
        size = per_axis(self.size, len(shape), "grid(size=…)")
        lines = [torch.arange(n) // s for n, s in zip(shape, size)]
        counts = [int(line[-1]) + 1 for line in lines]
        labels = torch.zeros((), dtype=torch.long)
        for line, n in zip(lines, counts):  # the last axis alone takes all voxels
            labels = (labels * n).unsqueeze(-1) + line
        corners = itertools.product(*(range(0, c * s, s) for c, s in zip(counts, size)))
        names = ["box " + " ".join(map(str, corner)) for corner in corners]
        features = Features(labels[None].to(objective.image.device), names)
        return _per_channel(features, _channel_names(objective)) if self.per_channel else features


class Channels(FeatureSpec):
    """Each channel of the image is a feature, such as the contrasts of an MR examination.

    Args:
        names: names of the channels; None: those of the case (a bundle's metadata.json), else ``channel 0``, ….
    """

    names: Sequence[str] | None = None

    def of(self, objective: Objective) -> Features:
        image = objective.image
        names = list(self.names or _channel_names(objective))
        if len(names) != len(image):
            raise UsageError(f"channels(names=…): {len(names)} names for {len(image)} channels")
        labels = torch.arange(len(image), device=image.device).reshape(-1, *(1,) * (image.ndim - 1))
        return Features(labels.expand(image.shape).clone(), names)


class LabelMap(FeatureSpec):
    """The regions of a label map, such as an atlas or an organ segmentation.

    Args:
        labels: a NIfTI file, a key of the data dictionary, or a tensor (*spatial) or (1, *spatial). A file or
            MetaTensor with another affine is resampled to the network's grid by nearest neighbour.
        names: label value to name; None: ``label 1``, ….
        background: the value that is no feature; None: every value is a feature.

    Example:
        >>> LabelMap(torch.tensor([[0, 3]]), names={3: "liver"}).parameters["background"]
        0
    """

    labels: str | Path | Tensor
    names: Mapping[Any, str] | None = None
    background: int | None = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self._names = {int(k): str(v) for k, v in (self.names or {}).items()}
        except (TypeError, ValueError) as error:
            raise UsageError(f"names={dict(self.names or {})}: give label value to name, such as 1: 'liver'") from error

    def of(self, objective: Objective) -> Features:
        return from_values(_labels(self.labels, objective), self._names, self.background)


class Supervoxels(FeatureSpec):
    """SLIC supervoxels (Achanta et al. 2012, scikit-image), in 2D and 3D, over all channels together; deterministic.

    Args:
        n_segments: approximate number of supervoxels.
        compactness: weight of distance against intensity, each channel scaled to [0, 1].
        mask: ``"foreground"`` (voxels that differ from the background by more than 5 % of the range, holes filled),
            ``"everything"``, or a label map as in `LabelMap`, whose voxels above zero are the mask. Voxels outside
            belong to no feature.
        max_voxels: larger images are segmented on a copy subsampled by a whole factor.
    """

    aliases = ("slic", "superpixels")

    n_segments: int = 100
    compactness: float = 0.1
    mask: str | Path | Tensor = "foreground"
    max_voxels: int = 1_000_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_segments < 1 or self.max_voxels < 1 or not 0 < self.compactness < math.inf:
            raise UsageError(
                f"supervoxels(n_segments={self.n_segments}, compactness={self.compactness}, "
                f"max_voxels={self.max_voxels}): all must be above 0"
            )

    def of(self, objective: Objective) -> Features:
        return objective.memo(self, lambda: self._segmented(objective))

    def _segmented(self, objective: Objective) -> Features:
        from scipy.ndimage import distance_transform_edt
        from skimage.segmentation import slic

        image = objective.image
        inside = self._mask(objective)
        step = _subsampling_step(image, self.max_voxels)
        mask = _subsample(inside[None], step)[0].cpu().numpy()
        if self.n_segments == 1:  # with a mask, scikit-image labels nothing
            return from_values(inside.long(), {}, 0, "supervoxel")
        segments = slic(
            _subsample(_unit_range(image), step).cpu().numpy().astype(np.float32),
            n_segments=self.n_segments,
            compactness=self.compactness,
            channel_axis=0,
            start_label=1,
            mask=None if mask.all() else mask,
        )
        if not segments.any():
            raise InputError("supervoxels: no voxel of the mask is left on the coarse grid: raise max_voxels")
        # mask voxels between those of the coarse grid belong to the nearest supervoxel
        nearest = distance_transform_edt(segments == 0, return_distances=False, return_indices=True)
        labels = torch.from_numpy(segments[tuple(nearest)].astype(np.int64))
        for axis, n in enumerate(inside.shape):
            labels = labels.repeat_interleave(step, axis).narrow(axis, 0, n)
        return from_values(torch.where(inside, labels.to(image.device), 0), {}, 0, "supervoxel")

    def _mask(self, objective: Objective) -> Tensor:
        image = objective.image
        if isinstance(self.mask, str) and self.mask in ("foreground", "everything"):
            everything = torch.ones_like(image[0], dtype=torch.bool)
            return foreground(image) if self.mask == "foreground" else everything
        inside = _labels(self.mask, objective) > 0
        if not bool(inside.any()):
            raise InputError("supervoxels: the mask has no voxel above 0 on the network's grid: give another one")
        return inside


def features_for(spec: Any) -> FeatureSpec:
    """Make a `FeatureSpec` from text, a label map (file, data key ``"key:NAME"`` or tensor (*spatial)), or an instance.

    >>> features_for("grid(8)").parameters
    {'size': 8, 'per_channel': False}
    """
    if isinstance(spec, np.ndarray):
        return LabelMap(torch.as_tensor(spec))
    if isinstance(spec, Tensor) or (isinstance(spec, (str, Path)) and str(spec).endswith((".nii", ".nii.gz"))):
        return LabelMap(spec)
    if isinstance(spec, str) and spec.startswith("key:"):
        return LabelMap(spec.removeprefix("key:"))
    return FEATURES.create(spec)


def per_axis(value: int | Sequence[int], axes: int, what: str) -> tuple[int, ...]:
    """Return one whole number above 0 per axis, from one for all axes or one per axis.

    Raises:
        UsageError: another number of values than axes, or a value below 1.
    """
    several = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(several) != axes or any(v < 1 for v in several):
        raise UsageError(
            f"{what}: {value} does not fit an image of {axes} axes: give a whole number above 0, or {axes} of them"
        )
    return tuple(int(v) for v in several)


def _labels(what: Any, objective: Objective) -> Tensor:
    """Load a label map (*spatial) on the grid of the objective's image by `label_on_grid`."""
    try:
        return label_on_grid(what, objective.image, objective.case)
    except EsegetaError as error:
        raise InputError(f"feature map: {error}") from error


def _channel_names(objective: Objective) -> list[str]:
    known = list(objective.case.channel_names)
    channels = len(objective.image)
    return known if len(known) == channels else [f"channel {c}" for c in range(channels)]


def from_values(values: Tensor, names: Mapping[int, str], background: int | None, word: str = "label") -> Features:
    """Make features from a map of label values (*spatial), numbered consecutively in the order of the values.

    Args:
        values: label values, int64.
        names: label value to name; missing values are named by ``word`` and value.
        background: the value that is no feature, or None.
        word: the prefix of generated names.

    Raises:
        InputError: there is no label besides the background.
    """
    present, numbers = torch.unique(values, return_inverse=True)
    labels = present.tolist()
    if background in labels:
        at = labels.index(background)
        numbers = torch.where(numbers == at, -1, numbers - (numbers > at).long())
        labels.pop(at)
    if not labels:
        raise InputError("the feature map has no label on the network's grid: nothing could be switched off")
    return Features(numbers[None], [names.get(v, f"{word} {v}") for v in labels])


def _per_channel(features: Features, channels: Sequence[str]) -> Features:
    labels = features.labels
    each = torch.cat([torch.where(labels < 0, -1, labels + c * len(features)) for c in range(len(channels))])
    return Features(each, [f"{c}, {n}" for c in channels for n in features.names])


def _unit_range(image: Tensor) -> Tensor:
    """Scale each channel from its 1st … 99th percentile to [0, 1]."""
    low, high = _percentiles(image)
    return ((image - low) / (high - low).clamp(min=torch.finfo(image.dtype).tiny)).clamp(0, 1)


def _subsampling_step(image: Tensor, voxels: int) -> int:
    """Return the smallest whole factor that subsamples an image to at most ``voxels`` voxels."""
    step = 1
    while image[0].numel() / step ** (image.ndim - 1) > voxels:
        step += 1
    return step


def _subsample(image: Tensor, step: int) -> Tensor:
    """Subsample (C, *spatial) to every ``step``-th voxel."""
    for axis in range(1, image.ndim):
        image = image.index_select(axis, torch.arange(0, image.shape[axis], step, device=image.device))
    return image


def _percentiles(image: Tensor) -> tuple[Tensor, Tensor]:
    """Estimate the 1st and 99th percentile of each channel, (C, 1, …), from about a million voxels."""
    ordered = _subsample(image, _subsampling_step(image, 1_000_000)).flatten(1).sort(1).values
    last, axes = ordered.shape[1] - 1, (1,) * (image.ndim - 1)
    return ordered[:, round(0.01 * last)].reshape(-1, *axes), ordered[:, round(0.99 * last)].reshape(-1, *axes)


def foreground(image: Tensor) -> Tensor:
    """Return the mask (*spatial) of voxels of (C, *spatial) that differ from the background in some channel.

    Holes are filled; if no voxel differs, the mask is True everywhere.
    """
    from scipy.ndimage import binary_fill_holes

    low, high = _percentiles(image)
    faces = [image.select(axis, end).flatten(1) for axis in range(1, image.ndim) for end in (0, -1)]
    background = torch.cat(faces, 1).median(1).values.reshape(low.shape)
    differs = ((image - background).abs() > 0.05 * (high - low)).any(0)
    if not bool(differs.any()):
        return torch.ones_like(differs)
    return torch.from_numpy(binary_fill_holes(differs.cpu().numpy())).to(image.device)
