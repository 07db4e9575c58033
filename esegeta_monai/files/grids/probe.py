"""Find out by a pattern added to the scan where a preprocessing puts its voxels.

The contents of some images cannot show whether maps lie in the right place: symmetric ones, noise, classes. Where the
preprocessing can run again, the scan gets a weak pattern whose strength shows where a voxel lies.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, LoadImaged
from torch import Tensor

from esegeta_monai.files.grids.geometry import REMEDY, Geometry

__all__ = ["Pipeline"]

STRENGTH = 0.05
"""Standard deviation of the pattern where it is strongest, in those of the scan."""
DRAWS = 6  # patterns that are tried
POINTS = 100_000  # image voxels that are read
SHARE = 0.25  # largest deviation, as a share of the image's extent
ERRORS = 3.0  # standard errors that a decision needs


@dataclass
class Pipeline:
    """A preprocessing and the entry of a scan, with which it can run again.

    Attributes:
        transforms: MONAI's ``Compose`` with the ``LoadImaged`` of the scan.
        entry: the data dictionary before it.
        key: key of the image that the network reads.
        context: context in which the transforms run.
    """

    transforms: Any
    entry: Mapping[str, Any]
    key: str
    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def probe(self, to_scan: Callable[[MetaTensor], np.ndarray]) -> Geometry | None:
        """Compare the place of the image's voxels with that of a pattern; None: the pattern does not show it.

        The pattern is normal noise in blocks of two voxels of the coarser grid, so that means and deviations stay. For
        each axis of the scan, of n voxels, its strength grows with the voxel index x in one copy of the scan, as
        ``(x + ½)/n``, and falls in another, as ``1 − (x + ½)/n``. With u and d the absolute changes of the image by the
        copies, u/(u + d) is ``(x + ½)/n`` of the scan's voxel that is shown, however intensities are changed. A
        weighted least-squares fit over the voxels gives x as an affine function of the image's voxel index.

        Args:
            to_scan: function of the image (C, *spatial) that returns the recorded matrix (d + 1, d + 1) of its voxel
                indices to those of the scan.
        """
        try:
            run = _Run(self)
            base = run(None)
            recorded = to_scan(base)
            if run.sizes is None or len(run.sizes) != base.ndim - 1:
                return None
            blocks = [max(2, round(2 * float(h))) for h in np.abs(recorded[:-1, :-1]).max(1)]
            # image voxels in a block, which are not independent
            block = max(1.0, float(np.prod(blocks)) / max(abs(float(np.linalg.det(recorded[:-1, :-1]))), 1e-9))
            fits: dict[int, _Fit] = {}
            for axis in (k for k, n in enumerate(run.sizes) if n > 1):
                changes = torch.zeros(2, base[0].numel(), dtype=torch.float64)  # see `_Fit`
                for draw in range(DRAWS):
                    if axis not in fits or not fits[axis].decides:
                        changes += _changes(run, base, axis, _noise(run.sizes, blocks, draw))
                        fits[axis] = _Fit(recorded[axis], run.sizes[axis], tuple(base.shape[1:]), changes, block)
        except Exception:  # transforms of a user may raise anything in a further run; the check stays undecided
            return None
        if not all(fit.decides for fit in fits.values()):
            return None
        axis, worst = max(fits.items(), key=lambda item: item[1].miss / item[1].bound)
        if worst.miss <= worst.bound:
            text = (
                "the preprocessed image, brought back to the scan's grid, shows a weak pattern of the scan in its place"
            )
            return Geometry("passed", text, worst.miss)
        text = (
            f"a weak pattern added to the scan comes back up to {worst.miss:.2g} voxels away along axis {axis}: "
            f"{REMEDY}"
        )
        return Geometry("refused", text, worst.miss)


def _changes(run: _Run, base: MetaTensor, axis: int, noise: Tensor) -> Tensor:
    """Return the absolute changes (2, N) of the image by the growing and the falling pattern, summed over channels."""
    n = noise.shape[axis]
    along = [1] * noise.ndim
    along[axis] = n
    ramp = ((torch.arange(n) + 0.5) / n).reshape(along)
    images = [run(noise * strength).as_tensor().double() for strength in (ramp, 1 - ramp)]
    return torch.stack([(image - base.as_tensor().double()).abs().sum(0).flatten() for image in images])


def _noise(sizes: tuple[int, ...], blocks: list[int], draw: int) -> Tensor:
    """Return standard normal noise (*sizes), equal within blocks."""
    cells = [-(-n // b) for n, b in zip(sizes, blocks)]
    noise = torch.randn(cells, generator=torch.Generator().manual_seed(draw))
    for axis, (n, b) in enumerate(zip(sizes, blocks)):
        noise = noise.repeat_interleave(b, axis).narrow(axis, 0, n)
    return noise


class _Run:
    """Runs a copy of the transforms with a pattern added to the loaded scan; each run draws the same numbers."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.sizes: tuple[int, ...] | None = None
        """Size of the loaded scan."""

    def __call__(self, pattern: Tensor | None) -> MetaTensor:
        """Return the image (C, *spatial) of the scan with a pattern (*scan), in units of `STRENGTH`; None: without."""
        flat = copy.deepcopy(self.pipeline.transforms).flatten().transforms
        steps = [step for t in flat for step in ((t, self._adder(t, pattern)) if isinstance(t, LoadImaged) else (t,))]
        with self.pipeline.context(), _same_random_numbers():
            image = Compose(steps).set_random_state(0)(dict(self.pipeline.entry))[self.pipeline.key]
        assert isinstance(image, MetaTensor)
        return image

    def _adder(self, loader: LoadImaged, pattern: Tensor | None) -> Callable[[dict[Any, Any]], dict[Any, Any]]:
        def add(data: dict[Any, Any]) -> dict[Any, Any]:
            for key in loader.keys:
                value = data.get(key)
                if not isinstance(value, MetaTensor):
                    continue
                sizes = tuple(int(n) for n in np.atleast_1d(value.meta["spatial_shape"]))
                if self.sizes is None:
                    self.sizes = sizes
                if pattern is not None and sizes == self.sizes:
                    last = tuple(value.shape[: len(sizes)]) == sizes  # channels at the end, or none
                    fitting = pattern.reshape(*sizes, *[1] * (value.ndim - len(sizes))) if last else pattern
                    data[key] = value + STRENGTH * value.float().std() * fitting
            return data

        return add


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Seed torch, NumPy and Python while the block runs, and restore their states."""
    own, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numbers)


class _Fit:
    """The voxel index of the scan along an axis, as an affine function of that of the image, against the recorded one.

    Args:
        recorded: voxel index of the image to that of the scan along the axis (d + 1,).
        n: voxels of the scan along the axis.
        size: size of the image.
        changes: absolute changes (2, N) of the image's voxels by the growing and the falling pattern, over all draws.
        block: image voxels in a block of the pattern.

    Attributes:
        miss: largest difference between fit and record at the image's corners, in voxels of the scan.
        bound: largest difference of an image in its place.
        decides: False if the fit is too uncertain.
    """

    def __init__(self, recorded: np.ndarray, n: int, size: tuple[int, ...], changes: Tensor, block: float) -> None:
        self.miss, self.bound, self.decides = 0.0, 1.0, False
        u, d = changes
        places = torch.arange(0, len(u), max(1, len(u) // POINTS))
        places = places[(u + d)[places] > 1e-3 * (u + d).max()]
        if len(places) < 10 * len(recorded):
            return
        weight = (u + d)[places].numpy()
        weight = np.minimum(weight, np.quantile(weight, 0.9))
        index = np.stack([*np.unravel_index(places.numpy(), size), np.ones(len(places))], 1)
        x = (u / (u + d))[places].numpy() * n - 0.5
        inverse = np.linalg.pinv(index.T @ (weight[:, None] * index))
        fitted = inverse @ index.T @ (weight * x)
        corners = np.array([[*corner, 1.0] for corner in product(*[(0, m - 1) for m in size])])
        claimed = corners @ recorded
        variance = float(weight @ (x - index @ fitted) ** 2 / weight.sum())
        error = np.sqrt(np.einsum("ij,jk,ik->i", corners, inverse * weight.mean() * variance * block, corners).max())
        self.miss = float(np.abs(corners @ fitted - claimed).max())
        self.bound = max(1.5 * float(max(1.0, np.abs(recorded[:-1]).max())), SHARE * float(np.ptp(claimed)))
        self.decides = ERRORS * float(error) <= self.bound
