"""Additive attribution maps back on the scan's own grid, with nothing lost on the way.

A preprocessing samples the scan: x_net = W x_scan. What an additive map a_net says about network voxels is handed
back to the scan voxels that they were made of,

    a_scan = Wᵀ D a_net,

where D makes every network voxel give away exactly its own relevance. The sum is conserved voxel by voxel, so that
maps whose positive and negative parts nearly cancel are right too; rescaling an interpolated map by a quotient of
sums is not (its denominator may be zero). Voxels that were sampled from outside of the scan (constant padding) hand
the share concerned to nobody; it is booked as ``sum_in_padding``:

    sum_network_grid = sum_scan_grid + sum_in_padding
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import ensure_tuple_rep

from esegeta_monai.errors import InputError
from esegeta_monai.files.grids.adjoint import invert_attribution

__all__ = ["InvertAttribution", "InvertAttributionD", "InvertAttributionDict", "InvertAttributiond"]


class InvertAttribution(Transform):
    """Bring an additive map from the network's grid to the scan's: a_scan = Wᵀ D a_net, sums conserved.

    For a map of activations times weights (GradCam, LayerActivation, …), which does not add up, use MONAI's
    ``Invertd(nearest_interp=False)``: it interpolates, so a constant stays that constant. Give it MetaTensors, since
    it leaves a plain tensor where it is, with no more than a warning.

    Every geometric transform that MONAI traces is undone, last first:

    * permutations (Orientation, Flip, Rotate90) move voxels back, bit by bit;
    * crops come back with zeros around; constant padding is cut off and booked, padding that copies voxels (reflect,
      edge, wrap, symmetric) is folded back onto the voxels copied;
    * Spacing, SpatialResample, ResampleToMatch, Affine, Rotate, Resize, Zoom: the adjoint of the sampling, see below.

    Random variants are read as what they drew. Lazy transforms are merged as MONAI merges them. Intensity transforms
    leave no trace and need none. What MONAI does not trace (Transpose, elastic deformation) cannot be undone; where
    the scan's ``original_affine`` and ``spatial_shape`` are known, ending elsewhere gives a warning.

    **Weights.** Network voxel i was sampled at the scan position p_i = X i. It hands its relevance to scan voxels j by
    tents along the scan's axes, D makes them sum to 1 less the share in padding:

        w_ij ∝ Π_k max(0, 1 − |p_ik − j_k| / h_k)           h_k = max(1, |row k of X|)

    Where the network's grid is as fine as the scan's or finer (h = 1) this is the exact adjoint of linear
    interpolation. Where it is coarser, the exact adjoint would put all relevance on the few scan voxels next to the
    sampling points, one voxel of 27 at a spacing of 3, and zero between: true to the letter, as the network has read
    nothing else, but it shows the sampling pattern rather than the anatomy, and moving the scan by one voxel would
    show another one. The tent is therefore as wide as the coarser of the two grids: the adjoint of the sampling
    with the anti-aliasing that it lacked. ``spread=False`` gives the exact adjoint. The mean over covered voxels
    (``mode="area"``, the default of Resize and Zoom) reads all voxels and is undone exactly. Nearest-neighbour
    sampling puts the centre of the tent on the voxel read. Splines of higher order are treated as linear: their
    negative lobes would give neighbours relevance of the opposite sign.

    Args:
        spread: whether a tent is widened to the coarser of the two grids (above).

    Memory: the map on the grids before and after one step, and a bounded chunk of weights. No dense matrix.

    Example:
        >>> from monai.transforms import Spacing
        >>> scan = MetaTensor(torch.rand(1, 8, 8, 8, dtype=torch.float64), affine=torch.eye(4))
        >>> image = Spacing((2.0, 1.0, 0.5))(scan)
        >>> attribution = image * torch.randn(image.shape, dtype=torch.float64)
        >>> back = InvertAttribution()(attribution)
        >>> tuple(back.shape), bool(torch.isclose(back.sum(), attribution.sum()))
        ((1, 8, 8, 8), True)
    """

    def __init__(self, spread: bool = True) -> None:
        self.spread = spread

    def __call__(self, attribution: torch.Tensor, image: MetaTensor | None = None) -> MetaTensor:
        """Return the map on the scan's grid.

        Args:
            attribution: additive map (C, *spatial), 2D or 3D, on the network's grid. It is not modified.
            image: preprocessed image (any channels, *spatial) whose ``applied_operations`` and affine describe how
                that grid came about; None where ``attribution`` is a MetaTensor that carries them itself.

        Returns:
            MetaTensor (C, *scan), in the dtype of the map (float32 for half precision), with the scan's affine and
            the image's metadata, no applied operations left, and in ``meta`` the floats ``sum_network_grid``,
            ``sum_scan_grid`` and ``sum_in_padding`` (over all channels, accumulated in float64).

        Raises:
            InputError: no trace, pending lazy operations, shapes that differ, or a transform of unknown adjoint.
        """
        return invert_attribution(attribution, image, spread=self.spread)


class InvertAttributiond(MapTransform):
    """Dictionary version of :class:`InvertAttribution`; the place of ``Invertd`` for maps that add up.

    Unlike ``Invertd`` it needs no ``transform``: the trace says all.

    Args:
        keys: additive maps (C, *spatial) on the network's grid.
        orig_keys: for each key, the preprocessed image whose trace and affine count; None: the map's own.
        spread: see :class:`InvertAttribution`.
        allow_missing_keys: skip keys that are not there.

    Raises:
        InputError: as :class:`InvertAttribution`, and where an ``orig_keys`` entry is missing.

    Example:
        >>> from monai.transforms import Flipd
        >>> data = Flipd("image")({"image": MetaTensor(torch.zeros(1, 4, 4))})
        >>> data["map"] = torch.arange(16.0).reshape(1, 4, 4)
        >>> back = InvertAttributiond("map", orig_keys="image")(data)["map"]
        >>> bool((back == data["map"].flip(1, 2)).all()), back.meta["sum_scan_grid"]
        (True, 120.0)
    """

    def __init__(
        self,
        keys: KeysCollection,
        orig_keys: KeysCollection | None = None,
        spread: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orig_keys = ensure_tuple_rep(orig_keys, len(self.keys))
        self.inverter = InvertAttribution(spread)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, orig_key in self.key_iterator(result, self.orig_keys):
            if orig_key is not None and orig_key not in data:
                raise InputError(f"orig_keys names {orig_key!r}, which is not among {sorted(map(str, data))}")
            result[key] = self.inverter(data[key], None if orig_key is None else data[orig_key])
        return result


InvertAttributionD = InvertAttributionDict = InvertAttributiond
