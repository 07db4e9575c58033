"""TorchIO: a subject as image, its map back on the grid before the transforms, and the windows of ``GridSampler``.

image = subject_image(subject, ["t1"])
for attribution in explainer(image, ["Saliency"], ["MultiClassMask(1)"]):
    map_on_original(attribution, subject, "t1").save("map.nii.gz")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SpatialResample
from monai.utils import optional_import
from torch import Tensor, nn

from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.files.grids.adjoint import invert_attribution
from esegeta_monai.files.grids.resample import to_scan_grid

__all__ = ["GridWindows", "map_on_original", "subject_image"]

EXACT = ("Flip", "Crop", "Pad", "Transpose")
"""Transforms that move whole voxels, which TorchIO inverts."""
ORIENTING = ("ToCanonical", "ToOrientation")
INTERPOLATION = {"linear": "bilinear", "nearest": "nearest"}


def _torchio() -> Any:
    torchio, installed = optional_import("torchio")
    if not installed:
        raise UsageError('this needs TorchIO: pip install "esegeta-monai[torchio]"')
    return torchio


def subject_image(subject: Any, images: Sequence[str]) -> MetaTensor:
    """Return images of a subject as a batch of one (1, C, W, H, D), with their affine (RAS mm).

    Args:
        subject: a ``torchio.Subject``.
        images: names of its images, whose channels are joined in this order.

    Raises:
        InputError: the subject has no such image, or they have different grids.
        UsageError: TorchIO is not installed.

    >>> import torchio  # doctest: +SKIP
    >>> subject = torchio.Subject(t1=torchio.ScalarImage(tensor=torch.rand(1, 4, 5, 6)))  # doctest: +SKIP
    >>> subject_image(subject, ["t1"]).shape  # doctest: +SKIP
    torch.Size([1, 1, 4, 5, 6])
    """
    _torchio()
    chosen = [_image(subject, name) for name in images]
    first = torch.as_tensor(chosen[0].affine)
    for name, image in zip(images, chosen):
        if image.spatial_shape != chosen[0].spatial_shape or not torch.allclose(torch.as_tensor(image.affine), first):
            raise InputError(
                f"the image {name!r} of the subject has another grid than {images[0]!r}: resample them to one grid, "
                "such as by torchio.Resample"
            )
    values = torch.cat([image.data for image in chosen])
    values = values if values.is_floating_point() else values.float()
    return MetaTensor(values[None], affine=first)


def _image(subject: Any, name: str) -> Any:
    known = list(subject.get_images_dict(intensity_only=False))
    if name not in known:
        raise InputError(f"the subject has no image {name!r}: it has {', '.join(known)}")
    return subject[name]


def map_on_original(
    attribution: Attribution, subject: Any, image: str, *, original: Any = None, spread: bool = True
) -> Any:
    """Return a map as ``torchio.ScalarImage`` (C, W, H, D) on the grid before the subject's transforms.

    The history is inverted from its end. Flips, crops, paddings and transpositions are inverted exactly. An orientation
    or one resampling with nothing but intensity transforms before it leads back to the original grid; additive maps by
    the adjoint of the interpolation, which conserves the sum, others by interpolation. ``Affine`` is inverted by
    interpolation, for maps that are not additive. Values in a padding belong to no voxel of the scan; their sum is
    ``image["sum_in_padding"]``.

    Args:
        attribution: of an `esegeta_monai.Explainer` for `subject_image` of the subject.
        subject: the transformed subject, with its history.
        image: name of an image of the explained ones.
        original: the image before the transforms, or its path, for orientations and resamplings; None: the file of the
            subject's image.
        spread: see `esegeta_monai.transforms.InvertAttribution`; False: the exact adjoint of the interpolation, which
            leaves voxels that a coarser grid skips at zero.

    Raises:
        InputError: a transform of the history cannot be inverted; the message names it.
        UsageError: there is no map, or TorchIO is not installed.
    """
    torchio = _torchio()
    if attribution.map is None:
        raise UsageError(f"there is no map ({attribution.status}): {attribution.record.get('reason')}")
    additive = attribution.method.additive
    here = _image(subject, image)
    values = attribution.map.as_tensor().detach().cpu()
    now = torchio.ScalarImage(tensor=values, affine=here.affine)
    history = [t for t in subject.get_applied_transforms() if _moves(t, image)]
    lost = 0.0
    while history:
        transform = history.pop()
        if transform.name in EXACT:
            _check_padding(transform, additive)
            before = float(now.data.sum(dtype=torch.float64))
            now = transform.inverse()(torchio.Subject({image: now}))[image]
            lost += before - float(now.data.sum(dtype=torch.float64))
        elif transform.name == "Affine" and not additive:
            transform.default_pad_value = 0
            now = transform.inverse()(torchio.Subject({image: now}))[image]
        elif transform.name in (*ORIENTING, "Resample"):
            _check_before(transform, history, additive)
            grid = _original(torchio, here, original, transform.name)
            modes = [t.image_interpolation for t in (*history, transform) if t.name == "Resample"]
            mode = INTERPOLATION.get(modes[0], "bilinear") if modes else "bilinear"
            moved = _to_grid(now, grid, mode, spread) if additive else _interpolated(now, grid)
            now = torchio.ScalarImage(tensor=moved, affine=grid.affine)
            break
        else:
            why = "for an additive map, whose sum it would not conserve" if transform.name == "Affine" else "exactly"
            raise _refused(transform.name, f"cannot be inverted {why}")
    now["sum_in_padding"] = lost
    return now


def _moves(transform: Any, image: str) -> bool:
    """Return True if a transform of the history changes places of voxels of an image."""
    if (transform.include and image not in transform.include) or (transform.exclude and image in transform.exclude):
        return False
    kinds = {kind.__name__ for kind in type(transform).__mro__}
    return transform.name == "Swap" or kinds.isdisjoint({"IntensityTransform", "LabelTransform"})


def _refused(name: str, why: str) -> InputError:
    return InputError(
        f"the transform {name} in the subject's history {why}, so the map has no place on the original grid: explain "
        "the subject without it, or use the map on the grid that the network saw"
    )


def _check_padding(transform: Any, additive: bool) -> None:
    """Refuse an additive map after a padding with copies of voxels, to which its values would have to go back."""
    if transform.name == "Pad" and additive and not isinstance(transform.padding_mode, (int, float)):
        raise _refused(f"Pad(padding_mode={transform.padding_mode!r})", "fills with values of the image")


def _check_before(transform: Any, history: Sequence[Any], additive: bool) -> None:
    """Check that all transforms before this one keep each voxel's place in the world."""
    fixed = (*ORIENTING, "Transpose") if additive else (*ORIENTING, "Transpose", "Resample", "Crop", "Pad")
    allowed = (*fixed, "Resample") if additive and transform.name != "Resample" else fixed
    names = [t.name for t in history]
    for name in names:
        if name not in allowed or (additive and names.count("Resample") > 1):
            raise _refused(f"{transform.name} after {name}", "cannot be inverted")
    for t in (*history, transform):
        if t.name == "Resample" and additive and (t.image_interpolation not in INTERPOLATION or t.antialias):
            raise _refused(f"Resample with {t.image_interpolation}, antialias={t.antialias}", "has no known adjoint")


def _original(torchio: Any, here: Any, given: Any, name: str) -> Any:
    source = given if given is not None else here.path
    if source is None:
        raise UsageError(
            f"the grid before {name} is not known, since the image was not read from a file: give original="
        )
    return source if isinstance(source, torchio.Image) else torchio.ScalarImage(source)


def _blank(grid: Any) -> MetaTensor:
    return MetaTensor(torch.zeros(1, *grid.spatial_shape, dtype=torch.float64), affine=torch.as_tensor(grid.affine))


def _interpolated(now: Any, grid: Any) -> Tensor:
    """Return a map (C, W, H, D) interpolated on another grid: (C, *grid)."""
    values = MetaTensor(now.data, affine=torch.as_tensor(now.affine))
    return to_scan_grid(values, _blank(grid), additive=False)[0]


def _to_grid(now: Any, grid: Any, mode: str, spread: bool) -> Tensor:
    """Return an additive map (C, W, H, D) on another grid (C, *grid), by the trace of MONAI's same resampling."""
    resample = SpatialResample(mode=mode, padding_mode="border", dtype=np.float64)
    affine = torch.as_tensor(now.affine)
    there: Any = resample(_blank(grid), dst_affine=affine, spatial_size=now.spatial_shape)
    values = MetaTensor(now.data, affine=affine, applied_operations=there.applied_operations)
    return invert_attribution(values, spread=spread).as_tensor()


class GridWindows:
    """The windows of ``torchio.GridSampler``, whose outputs ``torchio.GridAggregator`` blends.

    It is an inferer for `esegeta_monai.Explainer`; members and views come with
    `esegeta_monai.explain.EnsembleInferer`.

    Args:
        patch_size: size of a window (W, H, D), or one number.
        patch_overlap: overlap of neighbouring windows, even numbers.
        overlap_mode: ``"average"``, ``"hann"`` or ``"crop"``, as the aggregator's.
        batch_size: windows per forward pass.

    Raises:
        UsageError: another mode, or TorchIO is not installed.

    >>> GridWindows(64, 8, "mean")
    Traceback (most recent call last):
        ...
    esegeta_monai.errors.UsageError: overlap_mode='mean': give 'average', 'hann' or 'crop'
    """

    def __init__(
        self,
        patch_size: int | Sequence[int],
        patch_overlap: int | Sequence[int] = 0,
        overlap_mode: Literal["average", "hann", "crop"] = "average",
        batch_size: int = 4,
    ) -> None:
        if overlap_mode not in ("average", "hann", "crop"):
            raise UsageError(f"overlap_mode={overlap_mode!r}: give 'average', 'hann' or 'crop'")
        _torchio()
        self.patch_size, self.patch_overlap = _three(patch_size), _three(patch_overlap)
        self.overlap_mode, self.sw_batch_size = overlap_mode, batch_size

    def places(self, spatial_shape: Sequence[int]) -> tuple[tuple[slice, ...], ...]:
        """Return the places of the windows in a volume, by TorchIO's sampler.

        Raises:
            InputError: the windows do not fit the volume.
        """
        torchio = _torchio()
        blank = torchio.ScalarImage(tensor=torch.zeros(1, 1, 1, 1).expand(1, *spatial_shape))
        try:
            sampler = torchio.GridSampler(torchio.Subject(image=blank), self.patch_size, self.patch_overlap)
        except ValueError as error:
            raise InputError(f"TorchIO's GridSampler refuses the volume: {error}") from error
        return tuple(
            tuple(slice(int(a), int(b)) for a, b in zip(row[:3], row[3:], strict=True)) for row in sampler.locations
        )

    def owned(self, spatial_shape: Sequence[int]) -> tuple[tuple[slice, ...], ...]:
        """Return for each window the box in which the aggregator keeps its output; empty: everywhere.

        ``"crop"`` cuts half of the overlap where a window has a neighbour, and later windows replace earlier ones.
        """
        if self.overlap_mode != "crop":
            return ()
        places, boxes = self.places(spatial_shape), list[dict[int, slice]]()
        for axis, n in enumerate(spatial_shape):
            starts = sorted({place[axis].start for place in places})
            kept = [start and start + self.patch_overlap[axis] // 2 for start in starts]
            boxes.append({s: slice(a, b) for s, a, b in zip(starts, kept, [*kept[1:], n], strict=True)})
        return tuple(tuple(box[s.start] for box, s in zip(boxes, place, strict=True)) for place in places)

    def importance(self, dtype: torch.dtype) -> Tensor:
        """Return the weights of a window's voxels (W, H, D)."""
        weights = torch.ones(self.patch_size, dtype=dtype)
        if self.overlap_mode == "hann":
            for axis, n in enumerate(self.patch_size):
                shape = [n if axis == i else 1 for i in range(3)]
                # in float32, as the aggregator computes it
                weights = weights * torch.hann_window(n + 2, periodic=False)[1:-1].reshape(shape).to(dtype)
        return weights

    def declared_windows(self, spatial_shape: Sequence[int], dtype: torch.dtype) -> WindowPlan:
        """Return places and weights, from which the engine computes."""
        return WindowPlan(
            tuple(spatial_shape),
            self.patch_size,
            self.places(spatial_shape),
            ((0, 0),) * 3,
            importance=self.importance(dtype),
            batch_size=self.sw_batch_size,
            owned=self.owned(spatial_shape),
        )

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Predict (B, K, W, H, D): the weighted mean of the windows' outputs at each voxel of (B, C, W, H, D)."""
        weights = self.importance(inputs.dtype).to(inputs.device)
        places, total = self.places(inputs.shape[2:]), None
        sums = torch.zeros(inputs.shape[2:], dtype=inputs.dtype, device=inputs.device)
        for place, box in zip(places, self.owned(inputs.shape[2:]) or places, strict=True):
            where: Any = (..., *place)
            out = network(inputs[where], *args, **kwargs)
            whole = torch.zeros(*out.shape[:2], *inputs.shape[2:], dtype=out.dtype, device=out.device)
            inner: Any = (..., *(slice(b.start - p.start, b.stop - p.start) for b, p in zip(box, place, strict=True)))
            kept: Any = (..., *box)
            whole[kept] = (out * weights)[inner]
            total = whole if total is None else total + whole
            sums[kept] += weights[inner]
        assert total is not None
        return total / sums


def _three(value: int | Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (value,) * 3 if isinstance(value, int) else value
    return int(a), int(b), int(c)
