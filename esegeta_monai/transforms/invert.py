"""Bring additive attribution maps back to the scan's own grid, with conserved sums.

A preprocessing samples the scan: x_net = W x_scan. The relevance of each network voxel in an additive map a_net is
distributed to the scan voxels from which it was sampled,

    a_scan = Wᵀ D a_net,

where D normalises the weights, so that every network voxel distributes exactly its own relevance. The sum is conserved
for each voxel, also in maps whose positive and negative parts nearly cancel; rescaling an interpolated map by a ratio
of sums would fail there (the denominator may be zero). The share of network voxels that was sampled outside the scan
(constant padding) belongs to no scan voxel and is recorded as ``sum_in_padding``:

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
from esegeta_monai.utils.types import flag

__all__ = ["InvertAttribution", "InvertAttributionD", "InvertAttributionDict", "InvertAttributiond"]


class InvertAttribution(Transform):
    """Transform of an additive map from the network's grid to the scan's: a_scan = Wᵀ D a_net, sums conserved.

    Maps that are not additive (GradCam, LayerActivation, …: activations times weights) need MONAI's
    ``Invertd(nearest_interp=False)``: it interpolates, so a constant map stays constant. Pass it MetaTensors; it
    returns a plain tensor unchanged, with only a warning.

    Every geometric transform that MONAI traces is inverted, last first:

    * permutations (Orientation, Flip, Rotate90) move voxels back, bit by bit;
    * crops are padded with zeros; constant padding is cut off and its sum recorded; padding that copies voxels
      (reflect, edge, wrap, symmetric) is added to the copied voxels;
    * Spacing, SpatialResample, ResampleToMatch, Affine, Rotate, Resize, Zoom: the adjoint of the sampling, see below.

    Random transforms are inverted with the parameters that they drew. Lazy transforms are merged as MONAI merges them.
    Intensity transforms leave no trace and need none. Transforms that MONAI does not trace (Transpose, elastic
    deformation) cannot be inverted; if the scan's ``original_affine`` and ``spatial_shape`` are known and the result
    has others, a warning is given.

    **Weights.** Network voxel i was sampled at the scan position p_i = X i. Its relevance is distributed to scan voxels
    j by tent functions along the scan's axes, which D normalises to a sum of 1 minus the share in padding:

        w_ij ∝ Π_k max(0, 1 − |p_ik − j_k| / h_k)           h_k = max(1, |row k of X|)

    If the network's grid is as fine as the scan's or finer (h = 1), this is the exact adjoint of linear interpolation.
    If it is coarser, the exact adjoint would put all relevance on the few scan voxels next to the sampling points (one
    voxel of 27 at a spacing of 3), and zero between them. That is correct, because the network has read no other
    voxels, but it shows the sampling pattern rather than the anatomy, and the pattern changes if the scan is moved by
    one voxel. The tent is therefore as wide as the coarser of the two grids, which gives the adjoint of the sampling
    with anti-aliasing. ``spread=False`` gives the exact adjoint. The mean over covered voxels (``mode="area"``, the
    default of Resize and Zoom) reads all voxels and is inverted exactly. For nearest-neighbour sampling, the tent is
    centred on the voxel that was read. Splines of higher order are treated as linear: their negative lobes would give
    neighbours relevance of the opposite sign.

    Args:
        spread: True: widen the tent to the coarser of the two grids (see above); False: exact adjoint.

    Memory: the map on the grids before and after one step, and a bounded chunk of weights; no dense matrix.

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
        self.spread = flag("spread", spread)

    def __call__(self, attribution: torch.Tensor, image: MetaTensor | None = None) -> MetaTensor:
        """Return the map on the scan's grid.

        Args:
            attribution: additive map (C, *spatial), 2D or 3D, on the network's grid. It is not modified.
            image: preprocessed image (any channels, *spatial) whose ``applied_operations`` and affine describe the
                origin of that grid; None if ``attribution`` is a MetaTensor that has them itself.

        Returns:
            MetaTensor (C, *scan), in the dtype of the map (float32 for half precision), with the scan's affine and
            the image's metadata, no applied operations left, and in ``meta`` the floats ``sum_network_grid``,
            ``sum_scan_grid`` and ``sum_in_padding`` (over all channels, accumulated in float64).

        Raises:
            InputError: no trace, pending lazy operations, different shapes, or a transform without a known adjoint.
        """
        return invert_attribution(attribution, image, spread=self.spread)


class InvertAttributiond(MapTransform):
    """Dictionary version of :class:`InvertAttribution`; it replaces ``Invertd`` for additive maps.

    Unlike ``Invertd`` it needs no ``transform``, because the trace is sufficient.

    Args:
        keys: keys of additive maps (C, *spatial) on the network's grid.
        orig_keys: for each key, the key of the preprocessed image whose trace and affine are used; None: the map's own.
        spread: see :class:`InvertAttribution`.
        allow_missing_keys: skip missing keys.

    Raises:
        InputError: see :class:`InvertAttribution`; also if an entry of ``orig_keys`` is missing.

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
