"""The gradient at the image, and its product with the image."""

from __future__ import annotations

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import InputGradient
from esegeta_monai.methods.base import Explained, Method, Passes

__all__ = ["GradTimesImage", "InputXGradient", "Saliency", "VanillaBackprop"]


class Saliency(Method):
    """The gradient of the target at the image: ``a(v) = |∂F/∂x(v)|`` (Simonyan et al. 2014).

    Exact for the whole volume: the sum of the windows' vector-Jacobian products; ``abs`` is applied to the sum.

    Args:
        abs: True for the absolute value, False for the signed gradient.

    Example:
        >>> Saliency(abs=False).signed
        True
    """

    map_check = "derivative"
    reference = "Simonyan et al., ICLR workshop 2014, arXiv:1312.6034"
    produces = "input map"
    additive = False
    units = "target per unit of image intensity"

    abs: bool = True

    @property
    def signed(self) -> bool:
        return not self.abs

    def attribute(self, objective: Objective) -> Passes:
        """(k, C, *spatial)."""
        gradient = yield InputGradient()
        maps = gradient.maps[:, 0]
        return Explained(maps.abs() if self.abs else maps)


class VanillaBackprop(Saliency):
    """The signed gradient: `Saliency` with ``abs=False``."""

    map_check = "derivative"
    abs: bool = False


class InputXGradient(Method):
    """Image times gradient: ``a(v) = x(v) · ∂F/∂x(v)`` (Shrikumar et al. 2016).

    For a network that is linear in its input the sum of the map is ``F(x) − F(0)``.
    """

    map_check = "derivative times image"
    reference = "Shrikumar et al. 2016, arXiv:1605.01713"
    produces = "input map"
    additive = True
    units = "target per voxel"
    aliases = ("GradTimesImage",)

    def attribute(self, objective: Objective) -> Passes:
        """(k, C, *spatial)."""
        gradient = yield InputGradient()
        padding = gradient.padding[:, 0].sum(1, dtype=gradient.values.dtype) * objective.plan.cval
        return Explained(gradient.maps[:, 0] * objective.image, {"sum_in_padding": padding})


GradTimesImage = InputXGradient
