"""Activations of a layer, and the base class of layer methods."""

from __future__ import annotations

from typing import ClassVar

from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.layer_maps import BlendedActivations
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained, Method, Passes, Produces
from esegeta_monai.methods.layer.scattered import Reduce, check_reduce, reduce_channels

__all__ = ["LayerActivation", "LayerMethod"]


class LayerMethod(Method, registered=False):
    """Base class of methods whose map belongs to a layer.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"`` keeps every channel (a 4D NIfTI); ``"sum"``, ``"mean"``, ``"abs"`` (sum of absolute
            values) or ``"positive"`` (sum of positive values) give one map.
    """

    produces: ClassVar[Produces] = "layer map"
    several_calls: ClassVar[bool] = False
    """True: the method can read a layer that runs several times in a pass, each call in its own frame."""

    layer: str | None = None
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reduce(self.reduce)

    @property
    def signed(self) -> bool:
        return self.reduce not in ("abs", "positive")


class LayerActivation(LayerMethod):
    """The output of a layer on the image's grid: ``Σ_w ĝ_w · up(A_w)``, windows blended like the prediction; the mean
    over the calls of a layer that runs several times, each in the frame of the window.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"`` keeps every channel (a 4D NIfTI); ``"sum"``, ``"mean"``, ``"abs"`` (sum of absolute
            values) or ``"positive"`` (sum of positive values) give one map.
    """

    map_check = "activation"
    produces = "activation"
    additive = False
    units = "activation"
    several_calls = True

    reduce: Reduce = "mean"

    def passes(self, objective: Objective) -> int:
        """Count one forward pass of all windows, and the choice of a default layer."""
        return len(objective.plan)

    def attribute(self, objective: Objective) -> Passes:
        """(k, C, *spatial), the same for every target; C is 1 unless ``reduce="channels"``."""
        layer = check_layer(objective, self.layer, several=self.several_calls)
        linear = self.reduce if self.reduce in ("sum", "mean") else None  # linear, so that it may precede the blending
        activations = yield BlendedActivations(layer, linear)
        maps = activations if linear else reduce_channels(activations, self.reduce)
        return Explained(maps[None].expand(objective.n_targets, *maps.shape).clone(), {"layer": layer})
