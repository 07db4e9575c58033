"""Control maps that do not depend on the network. A method must be better than all of them.

They are methods (not in the registry), so that every metric treats them like other maps, including metrics that explain
again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Method

__all__ = ["ConstantControl", "Control", "RandomControl", "SobelControl", "constant_map", "controls", "random_map"]
__all__ += ["sobel_map"]


class Control(Method, registered=False):
    """A map that does not depend on the network."""

    produces = "input map"
    additive = False
    units = "none: a control"

    needs_gradient = False

    def passes(self, objective: Objective) -> int:
        """Zero: the network is not run."""
        return 0

    def attribute(self, objective: Objective) -> Tensor:
        """Return the same map for every target (k, C, *spatial)."""
        return self.map(objective.image, objective.seed).expand(objective.n_targets, *objective.image.shape).clone()

    def map(self, image: Tensor, seed: int) -> Tensor:
        """Return the map (C, *spatial) of an image (C, *spatial)."""
        raise NotImplementedError


class RandomControl(Control, registered=False):
    """Independent standard normal values, from the run's seed."""

    name: str | None = "control:random"

    def map(self, image: Tensor, seed: int) -> Tensor:
        return random_map(image, seed)


class SobelControl(Control, registered=False):
    """Edges of the image."""

    name: str | None = "control:sobel"

    @property
    def signed(self) -> bool:
        return False

    def map(self, image: Tensor, seed: int) -> Tensor:
        return sobel_map(image)


class ConstantControl(Control, registered=False):
    """Ones everywhere."""

    name: str | None = "control:constant"

    @property
    def signed(self) -> bool:
        return False

    def map(self, image: Tensor, seed: int) -> Tensor:
        return constant_map(image)


def controls() -> list[Control]:
    """Return one of each control.

    >>> [c.name for c in controls()]
    ['control:random', 'control:sobel', 'control:constant']
    """
    return [RandomControl(), SobelControl(), ConstantControl()]


def random_map(image: Tensor, seed: int = 0) -> Tensor:
    """Draw standard normal values like ``image`` (C, *spatial); the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)  # differs from the numbers that methods draw
    return torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image.device, image.dtype)


def sobel_map(image: Tensor) -> Tensor:
    """Compute ``√Σ_axes (Sobel_axis ∗ x)²`` of each channel (C, *spatial), in 2D and 3D; edges repeated."""
    from scipy.ndimage import sobel

    array = image.detach().cpu().double().numpy()
    axes = range(array.ndim - 1)
    edges = np.stack([np.sqrt(sum(sobel(c, axis, mode="nearest") ** 2 for axis in axes)) for c in array])
    return torch.from_numpy(edges).to(image.device, image.dtype)


def constant_map(image: Tensor) -> Tensor:
    """Return ones like ``image`` (C, *spatial)."""
    return torch.ones_like(image)
