"""Check by contents that an image, brought back to its scan's grid, lies where the scan lies.

A transform that moves voxels and records nothing (``Lambdad``, an own transform) leaves a wrong trace and a wrong
affine, and a map that follows them is written in the wrong place. The voxels show it: with s the scan, b the image
brought back and T a flip, the differences s − Ts and b − Tb have equal signs where b is the scan with other
intensities, and opposite signs if T has flipped b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor

__all__ = ["Geometry", "check_geometry"]

DECIDES = 0.1
"""A statistic above it supports the geometry, one below its negative contradicts it, others decide nothing."""
SHIFT = 0.5
"""Largest shift between scan and image, in voxels of the coarser grid."""
POINTS = {2: 64, 3: 24}
"""Largest number of sampling points per axis for flips, by the number of axes."""
NEAR = {2: 128, 3: 40}
"""The same for shifts, which are measured in the middle of the image, at the resolution of the coarser grid."""
CHANNELS = 8  # further channels are not compared
FEWEST = 250  # sampling points for a decision
OVERLAP = 0.25  # share of the points that a flip must keep inside both grids
ROUNDING = 1e-5  # of the range of the values
BINS = 32  # of the scan's intensities, for the correlation ratio

REMEDY = (
    "a transform of the preprocessing moved voxels without recording it (Lambdad, Transposed, an own transform). Use "
    "transforms that record it (Flipd, Rotate90d, Orientationd, Resized, …), or end the preprocessing with "
    "EnsureTyped(track_meta=False) to get maps on the network's grid"
)


@dataclass(frozen=True)
class Geometry:
    """The result of `check_geometry`.

    Attributes:
        verdict: ``passed``; ``warned``: the image cannot decide; ``refused``: the contents contradict the geometry.
        text: what was found and what follows from it.
        value: the smallest statistic over the axes, −1 to 1, or the shift in voxels if that is the reason; None if
            nothing could be compared.
    """

    verdict: Literal["passed", "warned", "refused"]
    text: str
    value: float | None = None

    def entry(self) -> dict[str, Any]:
        """Return the entry of a record's ``checks``."""
        entry: dict[str, Any] = {"check": "geometry", "verdict": self.verdict, "text": self.text}
        return entry if self.value is None else {**entry, "value": self.value}


def check_geometry(scan: Tensor, image: Tensor, to_scan: np.ndarray) -> Geometry:
    """Compare a preprocessed image with its scan, at the places that a map of the image takes.

    For each flip T of an axis, the statistic is sign(ρ(s, b)) · ρ(s − Ts, b − Tb), with ρ the rank correlation over
    sampling points that both grids cover. It does not depend on monotone changes of intensity, inversion included.
    Noise and nearly symmetric images can make it negative, so a contradiction also needs the contrast
    (u' − u)/(u' + u) of the shares of b's variance that s (u) and Ts (u') leave unexplained (one minus the correlation
    ratio). No change of intensity affects the contrast, so it decides alone for classes and absolute values. Flips of
    several axes and exchanged axes can only contradict, as can the stretch of an axis to the whole scan, by the
    contrast. A shift is the place of the peak of the cross-correlation of gradient magnitudes; it contradicts if the
    shifted scan fits better by the same contrast.

    Args:
        scan: (C, *scan) as loaded from its file.
        image: (C', *spatial) as the network reads it, 2D or 3D.
        to_scan: (d + 1, d + 1), voxel indices of the image to those of the scan, as maps are brought back.

    >>> scan = torch.rand(1, 24, 20, generator=torch.Generator().manual_seed(0))
    >>> check_geometry(scan, 3 - scan, np.eye(3)).verdict
    'passed'
    >>> check_geometry(scan, scan.flip(1), np.eye(3)).text.split(":")[0]
    "the image brought back to the scan's grid fits the scan better when flipped along axis 0"
    """
    scan, image = (torch.as_tensor(x).as_subclass(Tensor).detach() for x in (scan, image))
    d = image.ndim - 1
    if all(n == 1 for n in scan.shape[d + 1 :]):
        scan = scan.reshape(scan.shape[: d + 1])
    if scan.ndim != d + 1:
        return _undecided(f"the scan has {scan.ndim - 1} axes, the image {d}")
    pair = _Pair(scan[:CHANNELS], image[:CHANNELS], np.asarray(to_scan, dtype=np.float64))
    if not pair.decides:
        return _undecided(pair.why)
    undecided = pair.flips()
    pair.shifts()
    pair.stretches()
    return pair.refused() or undecided or pair.passed()


def _undecided(why: str, value: float | None = None) -> Geometry:
    text = f"this image cannot decide whether maps lie in the right place: {why}; look at a map over the scan"
    return Geometry("warned", text, value)


class _Pair:
    """A scan and its image at common sampling points, with the matrix between their voxels."""

    def __init__(self, scan: Tensor, image: Tensor, to_scan: np.ndarray) -> None:
        self.scan, self.image, self.to_scan = scan, image, to_scan
        self.to_image = np.linalg.inv(to_scan)
        self.axes = len(to_scan) - 1
        self.sizes, self.network = np.array(scan.shape[1:]), np.array(image.shape[1:])
        corners = np.array([[*corner, 1.0] for corner in product(*[(0, n - 1) for n in self.network])]) @ to_scan.T
        self.low = np.ceil(np.clip(corners[:, :-1].min(0), 0, self.sizes - 1) - 1e-6)
        self.high = np.floor(np.clip(corners[:, :-1].max(0), 0, self.sizes - 1) + 1e-6)
        self.voxel = np.maximum(1.0, np.abs(to_scan[:-1, :-1]).max(1))
        """Edges of the coarser grid's voxels, in voxels of the scan."""
        self.why = ""
        self.statistics: dict[int, float] = {}
        self.against: list[tuple[float, str, float]] = []
        """Contradictions: fit, name and statistic of the change (of a shift, voxels)."""
        self._sample()

    @property
    def decides(self) -> bool:
        """False if nothing can be compared; `why` has the reason."""
        return not self.why

    def _sample(self) -> None:
        most = POINTS[self.axes]
        step = np.maximum(self.voxel, (self.high - self.low) / (most - 1))
        # The image is averaged over as much as the scan. Positions lie anywhere between voxels, since interpolation
        # smooths, and those of a flip must not be smoother than their own.
        self.s_volume = _Volume(self.scan, step)
        ratio = step / self.voxel
        cell = np.abs(self.to_image[:-1, :-1] @ np.diag(step)).max(1)
        self.b_volume = _Volume(self.image, np.where(ratio.max() > 1, cell, 1.0))
        points = self._lattice(step, most)[0].reshape(self.axes, -1)
        points = points + (np.random.default_rng(0).random(points.shape) - 0.5) * np.minimum(step, 1.0)[:, None]
        inside = self._covered(points)
        self.points = points[:, inside]
        if self.points.shape[1] < FEWEST:
            self.why = f"the image brought back covers {self.points.shape[1]} of the sampling points"
            return
        s, b = self.s_volume(self.points), self.b_volume(_moved(self.to_image, self.points))
        fits = [
            (abs(r), i, j, r)
            for i, j in _channel_pairs(len(s), len(b))
            if (r := _rank_correlation(_without_rounding(s[i]), _without_rounding(b[j]))) is not None
        ]
        if not fits:
            self.why = "the scan or the preprocessed image is constant"
            return
        _, self.i, self.j, self.fit = max(fits)
        self.s, self.b = s[self.i], b[self.j]

    def _fineness(self) -> np.ndarray:
        """Return the number of the image's voxels per coarser voxel, along the image's axes."""
        return np.abs(self.to_image[:-1, :-1] @ np.diag(self.voxel)).max(1)

    def _lattice(self, step: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Return positions (d, *n) in voxels of the scan around the image's middle, and the numbers n (d,)."""
        count = np.minimum(np.floor(np.maximum(self.high - self.low, 0) / step + 1e-6).astype(int) + 1, most)
        middle = (self.low + self.high) / 2
        axes = [m + h * (np.arange(n) - (n - 1) / 2) for m, h, n in zip(middle, step, count)]
        return np.stack(np.meshgrid(*axes, indexing="ij")), count

    def _covered(self, points: np.ndarray) -> np.ndarray:
        """Return which positions (d, N) lie in the scan and in the image: bool (N,)."""
        inside = np.ones(points.shape[1], dtype=bool)
        for where, sizes in ((points, self.sizes), (_moved(self.to_image, points), self.network)):
            inside &= ((where > -0.5) & (where < sizes[:, None] - 0.5)).all(0)
        return inside

    # -- flips and exchanged axes ------------------------------------------------------------------------------------

    def flips(self) -> Geometry | None:
        """Collect the flips and exchanges of axes that fit better; return what is undecided, None if nothing is."""
        for axes, matrices in self._suspects():
            flip = isinstance(axes, tuple)
            measured = [(r, matrix) for matrix in matrices if (r := self._statistic(matrix, flip)) is not None]
            if isinstance(axes, tuple) and len(axes) == 1:
                self.statistics[axes[0]] = max((r for r, _ in measured), default=0.0)
            what = axes if isinstance(axes, str) else f"flipped along {_names(axes)}"
            self.against += [(self._fit(matrix), what, r) for r, matrix in measured if r < -DECIDES]
        undecided = tuple(k for k, r in self.statistics.items() if r <= DECIDES)
        if not undecided:
            return None
        why = f"it is nearly symmetric along {_names(undecided)}, or its preprocessing hides the scan's contents"
        return _undecided(why, self._least)

    @property
    def _least(self) -> float | None:
        return min(self.statistics.values(), default=None)

    def _fit(self, matrix: np.ndarray) -> float:
        """Return how well the scan moved by a matrix (scan to scan) fits the image, 0 to 1."""
        moved = _moved(matrix, self.points)
        kept = self._covered(moved)
        return _correlation_ratio(self.b[kept], self.s_volume(moved[:, kept], self.i)[0])

    def refused(self) -> Geometry | None:
        """Return the contradiction, with the change that fits best; None if there is none."""
        if not self.against:
            return None
        _, what, value = max(self.against)
        text = f"the image brought back to the scan's grid fits the scan better when {what}: {REMEDY}"
        return Geometry("refused", text, value)

    def passed(self) -> Geometry:
        """Return the result of an image that nothing contradicts."""
        return Geometry("passed", "the preprocessed image, brought back to the scan's grid, fits the scan", self._least)

    def _suspects(self) -> Iterator[tuple[tuple[int, ...] | str, list[np.ndarray]]]:
        """Yield the flipped axes of the scan, or words for exchanged axes, with the matrices (scan to scan) to test.

        Each is tested on the scan's grid and on the image's: the transform may have acted before or after a crop.
        """
        d = self.axes
        of_scan = [k for k in range(d) if self.sizes[k] > 1]
        along = np.abs(self.to_scan[:-1, :-1] / self.voxel[:, None]).argmax(0)  # the scan's axis of each of the image's
        for n in range(1, len(of_scan) + 1):
            for axes in combinations(of_scan, n):
                of_image = [k for k in range(d) if along[k] in axes]
                matrices = [_permuted(range(d), axes, self.sizes)]
                if len(of_image) == n:
                    matrices.append(self._of_image(_permuted(range(d), of_image, self.network)))
                yield axes, _distinct(matrices)
        for a, b in combinations(of_scan, 2):
            order = list(range(d))
            order[a], order[b] = b, a
            for flipped in ((), (a,), (b,), (a, b)):
                what = f"axes {a} and {b} are exchanged" + (f" and {_names(flipped)} flipped" if flipped else "")
                matrices = [
                    _permuted(order, flipped, self.sizes),
                    self._of_image(_permuted(order, flipped, self.network)),
                ]
                yield what, _distinct(matrices)
        for order in ([1, 2, 0], [2, 0, 1]) if len(of_scan) == 3 else ():
            matrices = [_permuted(order, (), self.sizes), self._of_image(_permuted(order, (), self.network))]
            yield f"its axes are read in the order {order}", _distinct(matrices)

    def _of_image(self, matrix: np.ndarray) -> np.ndarray:
        return self.to_scan @ matrix @ self.to_image

    def _statistic(self, matrix: np.ndarray, flip: bool) -> float | None:
        """Return the evidence, −1 to 1, against a transform T of the scan's voxels; None if it leaves too few points.

        A contradiction needs the contrast; exchanged axes (``flip=False``) need the rank statistic as well.
        """
        moved = _moved(matrix, self.points)
        kept = self._covered(moved)
        if kept.sum() < max(OVERLAP * len(kept), FEWEST):
            return None
        moved = moved[:, kept]
        s, b = self.s[kept], self.b[kept]
        ts = self.s_volume(moved, self.i)[0]
        tb = self.b_volume(_moved(self.to_image, moved), self.j)[0]
        rank = _rank_correlation(_without_rounding(s - ts, np.ptp(s)), _without_rounding(b - tb, np.ptp(b)))
        statistic = 0.0 if rank is None else float(np.sign(self.fit)) * rank
        contrast = _contrast(b, s, ts)
        if contrast < -DECIDES:
            return statistic if statistic < -DECIDES else contrast if flip else 0.0
        if contrast > DECIDES:
            return statistic if statistic > DECIDES else contrast
        return max(statistic, 0.0)

    # -- shifts ------------------------------------------------------------------------------------------------------

    def shifts(self) -> None:
        """Collect a shift beyond half a voxel of the coarser grid."""
        points, count = self._lattice(self.voxel, NEAR[self.axes])
        flat = points.reshape(self.axes, -1)
        covered = self._covered(flat).reshape(count)
        reach = NEAR[self.axes] // 2 * self.voxel  # the largest shift
        box = [slice(int(p.min() - h) - 2, int(p.max() + h) + 3) for p, h in zip(flat, reach)]
        s_volume = _Volume(self.scan[self.i : self.i + 1], self.voxel, box)
        s = s_volume(flat).reshape(count)
        there = _moved(self.to_image, flat)
        box = [slice(int(p.min()) - 2, int(p.max()) + 3) for p in there]
        b = _Volume(self.image[self.j : self.j + 1], self._fineness(), box)(there).reshape(count)
        s_edges, b_edges = _gradient(s, covered), _gradient(b, covered)
        if s_edges is None or b_edges is None:
            return
        spectrum = np.fft.rfftn(s_edges) * np.conj(np.fft.rfftn(b_edges))
        correlation = np.fft.irfftn(spectrum, s=s_edges.shape, axes=range(self.axes))
        correlation /= np.linalg.norm(s_edges) * np.linalg.norm(b_edges)
        peak = np.unravel_index(int(correlation.argmax()), correlation.shape)
        shift = np.array([_vertex(correlation, peak, k) for k in range(self.axes)])
        worst = int(np.abs(shift).argmax())
        # sampling the nearest voxel of a finer scan moves contents by up to half of that voxel
        if abs(shift[worst]) <= SHIFT + (0.5 / self.voxel[worst] if self.voxel[worst] > 1 else 0.0):
            return
        voxels = float(abs(shift[worst]) * self.voxel[worst])
        matrix = np.eye(self.axes + 1)
        matrix[:-1, -1] = shift * self.voxel
        moved = _moved(matrix, flat)
        kept = self._covered(flat) & self._covered(moved)
        if kept.sum() < FEWEST or _contrast(b.ravel()[kept], s.ravel()[kept], s_volume(moved)[0, kept]) >= -DECIDES:
            return
        self.against.append((self._fit(matrix), f"shifted by {voxels:.2g} voxels along axis {worst}", voxels))

    def stretches(self) -> None:
        """Collect axes along which the image covers more or less of the scan than it claims.

        A resampling without a record keeps the field of view and leaves the claimed voxel size: an image that covers
        the whole scan claims another extent.
        """
        claimed = np.array([[*corner, 1.0] for corner in product(*[(-0.5, n - 0.5) for n in self.network])])
        ends = (claimed @ self.to_scan.T)[:, :-1]
        for axis, (low, high, n) in enumerate(zip(ends.min(0), ends.max(0), self.sizes)):
            factor = n / (high - low)
            if n < 2 or abs(high - low - n) <= self.voxel[axis]:
                continue
            matrix = np.eye(self.axes + 1)
            matrix[axis, axis], matrix[axis, -1] = factor, -0.5 - factor * low
            moved = _moved(matrix, self.points)
            kept = self._covered(self.points) & (moved[axis] > -0.5) & (moved[axis] < n - 0.5)
            if kept.sum() < FEWEST:
                continue
            ts = self.s_volume(moved[:, kept], self.i)[0]
            if _contrast(self.b[kept], self.s[kept], ts) < -DECIDES:
                self.against.append((self._fit(matrix), f"stretched by {factor:.2g} along axis {axis}", float(factor)))


class _Volume:
    """A volume (C, *n) that is averaged over cells of about ``step`` voxels and read by linear interpolation.

    Cells are placed symmetrically, so that a symmetric volume stays symmetric.
    """

    def __init__(self, values: Tensor, step: np.ndarray, box: list[slice] | None = None) -> None:
        sizes = values.shape[1:]
        box = [slice(max(0, b.start), min(n, b.stop)) for b, n in zip(box, sizes)] if box else [slice(n) for n in sizes]
        index: tuple[slice, ...] = (slice(None), *box)
        values = values[index].float()
        self.first = np.array([b.start or 0 for b in box])
        self.sizes = np.array(values.shape[1:])
        cells = [max(1, int(np.ceil(n / max(1.0, h) - 1e-6))) for n, h in zip(self.sizes, step)]
        pool: Any = F.adaptive_avg_pool3d if len(cells) == 3 else F.adaptive_avg_pool2d
        same = all(c == n for c, n in zip(cells, self.sizes))
        self.values = (values if same else pool(values[None], cells)[0]).cpu().double()

    def __call__(self, points: np.ndarray, channel: int | None = None) -> np.ndarray:
        """Return the values (C, N) at positions (d, N) in voxels of the whole volume."""
        values = self.values if channel is None else self.values[channel : channel + 1]
        d, n = points.shape
        where = (2 * (points - self.first[:, None]) + 1) / self.sizes[:, None] - 1
        grid = torch.from_numpy(where[::-1].T.copy()).reshape(1, n, *[1] * (d - 1), d)
        read = F.grid_sample(values[None], grid, "bilinear", "border", align_corners=False)
        return read.reshape(len(values), n).numpy()


def _moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return matrix[:-1, :-1] @ points + matrix[:-1, -1:]


def _permuted(order: Any, flipped: Any, sizes: np.ndarray) -> np.ndarray:
    """Return the matrix of x'_k = x_order[k], or of n_k − 1 − x_order[k] for a flipped axis k."""
    d = len(sizes)
    matrix = np.zeros((d + 1, d + 1))
    matrix[d, d] = 1.0
    for k, source in enumerate(order):
        matrix[k, source] = -1.0 if k in flipped else 1.0
        matrix[k, d] = sizes[k] - 1 if k in flipped else 0.0
    return matrix


def _distinct(matrices: list[np.ndarray]) -> list[np.ndarray]:
    first, *others = matrices
    return [first, *(m for m in others if not np.allclose(m, first, atol=1e-3))]


def _channel_pairs(of_scan: int, of_image: int) -> Iterator[tuple[int, int]]:
    return zip(range(of_scan), range(of_image)) if of_scan == of_image else product(range(of_scan), range(of_image))


def _names(axes: tuple[int, ...]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {' and '.join(map(str, axes))}"


def _without_rounding(values: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Return values (N,) as multiples of their rounding error, so that it does not get ranks."""
    scale = np.ptp(values) if scale is None else scale
    return np.round(values / (ROUNDING * scale)) if scale > 0 else np.zeros_like(values)


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return Spearman's correlation of (N,) and (N,); None if one is constant."""
    ranks = [rankdata(x) - (len(x) + 1) / 2 for x in (a, b)]
    norms = [np.linalg.norm(r) for r in ranks]
    return float(ranks[0] @ ranks[1] / (norms[0] * norms[1])) if all(norms) else None


def _correlation_ratio(values: np.ndarray, given: np.ndarray) -> float:
    """Return the share of the variance of (N,) that bins of ``given`` (N,) explain, 0 to 1."""
    total = values.var()
    if total == 0:
        return 0.0
    n = max(2, min(BINS, len(values) // 20))
    edges = np.unique(np.quantile(given, np.linspace(0, 1, n + 1)[1:-1]))
    bins = np.searchsorted(edges, given)
    count = np.bincount(bins)
    means = np.bincount(bins, values) / np.maximum(count, 1)
    return float(count @ (means - values.mean()) ** 2 / len(values) / total)


def _contrast(b: np.ndarray, s: np.ndarray, moved: np.ndarray) -> float:
    """Return (u' − u)/(u' + u) of the shares u of the variance of b (N,) that s and s moved leave unexplained."""
    own, other = (1.0 - _correlation_ratio(b, given) for given in (s, moved))
    return (other - own) / max(other + own, ROUNDING)


def _gradient(values: np.ndarray, covered: np.ndarray) -> np.ndarray | None:
    """Return the centred gradient magnitude (*n), zero at the border; None if it is constant."""
    if min(values.shape) < 2:
        return None
    magnitude = np.sqrt(sum(g**2 for g in np.gradient(values)))
    for k, n in enumerate(values.shape):
        along = [1] * values.ndim
        along[k] = n
        covered = covered * np.hanning(n + 2)[1:-1].reshape(along)
    magnitude = (magnitude - np.average(magnitude, weights=covered)) * covered
    return magnitude if np.ptp(magnitude) > 0 else None


def _vertex(correlation: np.ndarray, peak: Any, axis: int) -> float:
    """Return the place of the maximum along an axis, by a parabola through the peak and its neighbours."""
    n, at = correlation.shape[axis], peak[axis]
    place = float(at if at <= n // 2 else at - n)
    if n < 3:
        return place
    low, here, high = (float(np.take(correlation, at + k, axis, mode="wrap")[_without(peak, axis)]) for k in (-1, 0, 1))
    bend = low - 2 * here + high
    return place if bend >= 0 else place + 0.5 * (low - high) / bend


def _without(index: Any, axis: int) -> tuple[int, ...]:
    return tuple(int(i) for k, i in enumerate(index) if k != axis)
