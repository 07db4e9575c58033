"""Parametrisation of a synthesised image: bases, intensity range and random views."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.errors import UsageError

__all__ = ["Fourier", "Phase", "RandomView", "Voxels", "hartley", "squash"]


class Voxels:
    """The identity basis: one parameter per voxel."""

    def image(self, numbers: Tensor) -> Tensor:
        """(C, *shape)."""
        return numbers

    def numbers(self, image: Tensor) -> Tensor:
        """Return the numbers (C, *spatial) of an image (C, *spatial): the inverse of `image`."""
        return image


class Fourier:
    """The frequency basis: ``z = H(s · θ)``, H the Hartley transform and ``s(f) ∝ |f|^−decay``.

    The Hartley transform is the Fourier transform of real numbers by real numbers (`hartley`), so that every parameter
    has an effect. Low frequencies change more for the same step, which suppresses high-frequency patterns (Olah
    et al. 2017). s has a mean square of 1: θ of variance 1 gives an image of variance 1, and ``|z|² = Σ (s θ)²``
    (Parseval).

    Args:
        shape: spatial shape of the image.
        decay: exponent; None: half the number of axes longer than one voxel, which gives each octave the same share of
            the variance (1 in 2D, as in natural images; 1.5 in 3D).
        dtype, device: those of the image.
    """

    def __init__(
        self,
        shape: Sequence[int],
        decay: float | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        axes = [n for n in shape if n > 1]
        self.decay = len(axes) / 2 if decay is None else decay
        square = torch.zeros(tuple(shape), dtype=torch.float64)
        for axis, n in enumerate(shape):
            square += torch.fft.fftfreq(n, dtype=torch.float64).square().reshape(-1, *(1,) * (len(shape) - 1 - axis))
        scale = square.sqrt().clamp(min=1 / max(axes, default=1)) ** -self.decay
        self.scale = (scale / scale.square().mean().sqrt()).to(device, dtype)

    def image(self, numbers: Tensor) -> Tensor:
        """(C, *shape)."""
        return hartley(self.scale * numbers)

    def numbers(self, image: Tensor) -> Tensor:
        """Return the numbers (C, *spatial) of an image (C, *spatial): the inverse of `image`."""
        return hartley(image) / self.scale


class Phase:
    """The phase basis of MaCo (Fel et al. 2023): ``x = F⁻¹(|F(x₀)| e^{iφ})``, with the magnitudes of given data.

    ``φ(f) = θ(f) − θ(−f)`` is odd, so that x is real and its magnitudes are exactly those of the data at every
    frequency, whatever θ. Coefficients that are their own mirror (such as the mean) keep the sign of the data.

    Args:
        data: image (C, *spatial) whose spectrum is kept.
    """

    def __init__(self, data: Tensor) -> None:
        self.axes = tuple(range(1, data.ndim))
        spectrum = torch.fft.fftn(data.double(), dim=self.axes)
        own = torch.ones(data.shape[1:], dtype=torch.bool, device=data.device)
        for axis, n in enumerate(data.shape[1:]):
            at = torch.arange(n, device=data.device)
            own &= ((2 * at) % n == 0).reshape(-1, *(1,) * (data.ndim - 2 - axis))
        self.magnitude = torch.where(own, spectrum.real, spectrum.abs()).to(data.dtype)

    def image(self, numbers: Tensor) -> Tensor:
        """(C, *shape)."""
        mirrored = numbers.flip(self.axes).roll([1] * len(self.axes), self.axes)
        phase = numbers - mirrored
        spectrum = self.magnitude * torch.complex(phase.cos(), phase.sin())
        return torch.fft.ifftn(spectrum, dim=self.axes).real


def hartley(values: Tensor) -> Tensor:
    """Compute ``H(u) = N^−½ Σ_v x(v) (cos + sin)(2π u·v/n)`` of (C, *spatial): orthonormal, and its own inverse.

    >>> x = torch.arange(6.0).reshape(1, 2, 3)
    >>> torch.allclose(hartley(hartley(x)), x, atol=1e-6)
    True
    """
    spectrum = torch.fft.fftn(values, dim=tuple(range(1, values.ndim)), norm="ortho")
    return spectrum.real - spectrum.imag


def squash(values: Tensor, intensity: Tensor) -> Tensor:
    """Map (C, *spatial) to intensities ``low + (high − low) σ(z)`` of each channel's range (C, 2)."""
    low, high = (per_channel(intensity[:, i], values) for i in (0, 1))
    return low + (high - low) * torch.sigmoid(values)


def per_channel(values: Tensor, image: Tensor) -> Tensor:
    """Reshape (C,) to (C, 1, …), to be broadcast over an image (C, *spatial)."""
    return values.reshape(-1, *(1,) * (image.ndim - 1))


@dataclass(frozen=True)
class RandomView:
    """A random view of an image: rotated, scaled, shifted; linear interpolation, reflected at the borders.

    Args:
        jitter: greatest shift in voxels along each axis.
        scale: least and greatest scale factor.
        rotate: greatest rotation in degrees in each plane (three planes in 3D), in millimetre space.
        spacing: voxel size in mm; None: 1.
    """

    jitter: int
    scale: tuple[float, float]
    rotate: float
    spacing: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.jitter < 0 or self.rotate < 0 or not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(
                f"jitter={self.jitter}, scale={self.scale}, rotate={self.rotate}: give a number of voxels, two "
                "positive factors, the smaller first, and degrees"
            )

    @property
    def idle(self) -> bool:
        """True if every view is the image itself."""
        return self.jitter == 0 and self.rotate == 0 and self.scale == (1, 1)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Draw a random affine map from output to input voxels, relative to the image's middle: (d, d + 1), float64."""

        def uniform(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

        d = len(shape)
        axes = [a for a in range(d) if shape[a] > 1]
        matrix = torch.eye(d, dtype=torch.float64)
        for a, b in itertools.combinations(axes, 2):
            angle = math.radians(uniform(-self.rotate, self.rotate))
            turn = torch.eye(d, dtype=torch.float64)
            turn[a, a] = turn[b, b] = math.cos(angle)
            turn[a, b], turn[b, a] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ turn
        voxel = torch.tensor(self.spacing or (1.0,) * d, dtype=torch.float64)
        matrix = matrix * voxel / voxel[:, None]
        factor = uniform(*self.scale)
        shift = torch.zeros(d, dtype=torch.float64)
        for a in axes:
            matrix[a] /= factor
            shift[a] = int(torch.randint(-self.jitter, self.jitter + 1, (), generator=generator))
        return torch.cat([matrix, shift[:, None]], 1)

    def show(self, image: Tensor, way: Tensor) -> Tensor:
        """Apply a map of `draw` to the image (C, *spatial); differentiable, linear in the image."""
        half = torch.tensor(image.shape[1:], dtype=torch.float64) / 2
        theta = torch.cat([way[:, :-1] * half / half[:, None], (way[:, -1] / half)[:, None]], 1)
        # grid_sample counts axes from the last one
        theta = torch.cat([theta[:, :-1].flip(0, 1), theta[:, -1:].flip(0)], 1).to(image.device, image.dtype)
        grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
        return F.grid_sample(image[None], grid, "bilinear", "reflection", align_corners=False)[0]
