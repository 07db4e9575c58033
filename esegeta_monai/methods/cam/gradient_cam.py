"""Class activation maps: activations of a layer, weighted by the target's dependence on each channel.

There are two kinds. *Weighted* maps (Grad-CAM and most others) have one weight per channel for the whole volume, summed
over the windows that the target sees; the activations of **all** windows are blended with these weights. *Scattered*
maps (HiResCAM, LayerCAM) multiply activation and gradient position by position; they already contain the blending
weights, so windows are added, and only those that the target sees matter. ReLU is applied last, to the whole map.

A layer that runs several times in a pass, as in a network that also sees the mirrored window, has a map per call, made
with the gradients of that call and put into the frame of the window; the map is their sum. The same holds for the
members of an ensemble and for mirrored views.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.calls import parts_of
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.layer_maps import BlendedActivations
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method, Passes
from esegeta_monai.methods.cam.requests import (
    ChannelGradients,
    ChannelMoments,
    ChannelSums,
    Moments,
    _PlusPlusWeights,
    _Products,
)
from esegeta_monai.methods.layer.scattered import ScatteredGradients
from esegeta_monai.methods.lockstep import lockstep
from esegeta_monai.methods.run import run

__all__ = ["EigenCam", "GradCam", "GradCamPlusPlus", "HiResCam", "LayerCam", "SegXResCam", "XGradCam"]
__all__ += ["check_layers"]

Layers = str | Sequence[str] | None
LayerPasses = Generator[Request, Any, Tensor]


class _Cam(Method):
    """Base class of class activation maps.

    Args:
        layer: dotted name, or a list of them, which gives one channel per layer; None: the default layer, named in the
            record. Tokens (transformers) are arranged on their grid.
        relu: keep positive values only.
    """

    produces = "layer map"
    additive = False
    units = "weighted activation"

    several_calls: ClassVar[bool] = False
    """True: the map of a layer that runs several times is the sum of the maps of its calls, each in its own frame."""

    call_by_call: ClassVar[bool] = False
    """True: the map of an ensemble is the weighted mean of the maps of its members and views, each made alone."""

    layer: Layers = None
    relu: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None and not isinstance(self.layer, str) and not len(self.layer):
            raise UsageError("layer=[]: give the dotted name of a module, or a list of them")

    @property
    def signed(self) -> bool:
        return not self.relu

    def passes(self, objective: Objective) -> int:
        """Count gradients of windows that the target sees, activations of all, and the choice of a default layer."""
        return len(objective.windows) + len(objective.plan)

    def attribute(self, objective: Objective) -> Passes:
        """(k, 1, *spatial), or (k, L, *spatial) for a list of L layers."""
        layers = self.layers(objective)
        if self.call_by_call and objective.plan.call_count > 1:
            maps = self._mean_of_calls(objective, layers)
        else:
            maps = torch.cat((yield from lockstep([self.layer_map(objective, layer) for layer in layers])), 1)
        return Explained(maps.relu() if self.relu else maps, {"layer": layers[0] if len(layers) == 1 else layers})

    def _mean_of_calls(self, objective: Objective, layers: tuple[str, ...]) -> Tensor:
        """Return the weighted mean (k, L, *spatial), before ReLU, of the maps of each member and view alone."""
        alone = replace(self, layer=layers, relu=False)
        maps = [share * run(alone, part).maps for share, part in parts_of(objective, lambda call: call)]
        return torch.stack(maps).sum(0)

    def layers(self, objective: Objective) -> tuple[str, ...]:
        """Return the dotted names of the layers, all of which exist."""
        return check_layers(objective, self.layer, several=self.several_calls)

    @abstractmethod
    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        """Request the sweeps of one layer's map, and return the map (k, 1, *spatial) before ReLU."""


def check_layers(objective: Objective, layer: Layers, *, several: bool = False) -> tuple[str, ...]:
    """Return the named layers, or the default one.

    Args:
        objective: network and window plan.
        layer: dotted name, a list of them, or None.
        several: True: the method can read a layer that runs several times.

    Raises:
        UsageError: a layer does not exist, or the list is empty.
        MethodError: a layer runs several times and the method cannot read it.
    """
    if layer is None or isinstance(layer, str):
        return (check_layer(objective, layer, several=several),)
    if not isinstance(layer, Sequence) or not layer:
        raise UsageError(f"layer={layer!r}: give the dotted name of a module, or a list of them")
    return tuple(dict.fromkeys(check_layer(objective, name, several=several) for name in layer))


class GradCam(_Cam):
    """``ReLU(Σ_c α_c A_c)`` with ``α_c`` the mean of ``∂F/∂A_c`` over the layer's positions (Selvaraju et al. 2017).

    The channel weights belong to the whole volume: gradients of all windows that the target sees are summed first;
    then the weighted activations of **all** windows are blended, and ReLU is applied to the blend. With a segmentation
    target this is Seg-Grad-CAM (Vinogradova et al. 2020).

    Args:
        layer: dotted name, or a list of them, which gives one channel per layer; None: the default layer, named in the
            record. Tokens (transformers) are arranged on their grid.
        relu: keep positive values only.

    Example:
        >>> GradCam(layer="model.0").signed
        False
    """

    map_check = "grad-cam"
    reference = "Selvaraju et al., ICCV 2017, arXiv:1610.02391"
    aliases = ("SegGradCam",)
    several_calls = True

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        weights = yield ChannelGradients(layer)
        return (yield BlendedActivations(layer, weights))


class GradCamPlusPlus(_Cam):
    """``ReLU(Σ_c w_c A_c)`` with ``w_c = Σ_p α_cp ReLU(g_cp)``, ``α = g² / (2 g² + g³ Σ_q A_cq)``, g = ∂F/∂A
    (Chattopadhay et al. 2018, equation 19; their common factor exp(F) is left out, as it overflows for sums over many
    voxels).

    Positions p run over all windows that the target sees; ``Σ_q A_cq`` is the sum over the volume, each window with its
    blending weight. (MONAI's GradCAMpp has ``Σ_q A_cq g_cq³`` instead, which is not the paper's.)

    Args:
        layer, relu: see `GradCam`.
    """

    reference = "Chattopadhay et al., WACV 2018, arXiv:1710.11063"
    full_precision = True  # α has a pole where g Σ A = −2: rounding moves it

    def passes(self, objective: Objective) -> int:
        """Count activations of all windows twice (α needs their sum), and gradients of those that the target sees."""
        return 2 * len(objective.plan) + len(objective.windows)

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        sums: Tensor = yield ChannelSums(layer, before_gradient=True)
        weights = yield _PlusPlusWeights(layer, sums)
        return (yield BlendedActivations(layer, weights))


class XGradCam(_Cam):
    """``ReLU(Σ_c w_c A_c)`` with ``w_c = Σ_p A_cp ∂F/∂A_cp / Σ_p A_cp`` (Fu et al. 2020).

    The denominator is the sum over the volume, each window counting with its blending weight; a channel whose
    activations sum to zero is left out.

    Args:
        layer, relu: see `GradCam`.
    """

    reference = "Fu et al., BMVC 2020, arXiv:2008.02312"
    several_calls = True
    full_precision = True  # Σ A may cancel: rounding then determines the weight

    def passes(self, objective: Objective) -> int:
        """Count the gradients of windows that the target sees, and the activations of all windows twice."""
        return 2 * len(objective.plan)

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        sums, above = yield from lockstep([_ask(ChannelSums(layer)), _ask(_Products(layer))])
        sums = sums.unsqueeze(-2)
        return (yield BlendedActivations(layer, torch.where(sums == 0, 0.0, above / sums)))


def _ask(request: Request) -> Generator[Request, Any, Any]:
    return (yield request)


class EigenCam(_Cam):
    """``ReLU(Σ_c v_c A_c)`` with v the first principal direction of the activations (Muhammad & Yeasin 2020).

    v is the first eigenvector of ``Σ_p A_p A_pᵀ`` over the volume's positions p (the first right singular vector of
    the activation matrix, which is not centred), its sign such that the map's sum is not negative. It needs no gradient
    and is the same for every target.

    Args:
        layer, relu: see `GradCam`.
    """

    call_by_call = True
    reference = "Muhammad & Yeasin, IJCNN 2020, arXiv:2008.00299"
    units = "projected activation"

    def passes(self, objective: Objective) -> int:
        """Count the activations of all windows, twice."""
        return 2 * len(objective.plan)

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        moments: ChannelMoments = yield Moments(layer)
        direction = torch.linalg.eigh(moments.second).eigenvectors[:, -1]
        if direction @ moments.first < 0:
            direction = -direction
        return (yield BlendedActivations(layer, direction.expand(objective.n_targets, -1)))


class HiResCam(_Cam):
    """``ReLU(Σ_c A_c ∂F/∂A_c)``, position by position (Draelos & Carin 2020).

    Without ``relu`` the sum of the map is that of activation times gradient at the layer.

    Args:
        layer, relu: see `GradCam`.
    """

    map_check = "activation times gradient"
    reference = "Draelos & Carin 2020, arXiv:2011.08891"
    several_calls = True
    units = "target per voxel"

    def passes(self, objective: Objective) -> int:
        """Count the gradients of windows that the target sees, and the choice of a default layer."""
        return len(objective.windows)

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        maps, _ = yield ScatteredGradients(layer, torch.mul)
        return maps


class LayerCam(HiResCam):
    """``ReLU(Σ_c A_c ReLU(∂F/∂A_c))``, position by position (Jiang et al. 2021).

    Args:
        layer, relu: see `GradCam`.
    """

    map_check = "activation times positive gradient"
    reference = "Jiang et al., IEEE TIP 2021, doi:10.1109/TIP.2021.3089943"

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        maps, _ = yield ScatteredGradients(layer, _positive_product)
        return maps


class SegXResCam(HiResCam):
    """``ReLU(Σ_c A_c up(pool(∂F/∂A_c)))``: `HiResCam` with gradients that are pooled over blocks of positions and
    enlarged again by repetition (Hasany et al. 2023).

    Blocks of one position give `HiResCam`; one block for the whole layer, with ``pooling="mean"``, gives
    `LayerGradCam` on one window. Blocks begin at the first position of a window; those at its end may be smaller.

    Args:
        layer, relu: see `GradCam`.
        block: positions of a block along each axis.
        pooling: ``"max"``, as in the paper, or ``"mean"``.
    """

    reference = "Hasany et al., CVPR workshop 2023 (XAI4CV), pages 3733-3738"

    block: int = 2
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.pooling not in ("max", "mean"):
            raise UsageError(f"SegXResCam: block={self.block} must be at least 1, pooling={self.pooling!r} max or mean")

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        maps, _ = yield ScatteredGradients(layer, _PooledProduct(self.block, self.pooling))
        return maps


@dataclass(frozen=True)
class _PooledProduct:
    """Activation times pooled gradient; equal instances share a request."""

    block: int
    pooling: str

    def __call__(self, activations: Tensor, gradients: Tensor) -> Tensor:
        positions = gradients.shape[3:]
        pool: Any = {  # with ceil_mode, the mean of a smaller block at the end counts its own positions only
            ("max", 2): partial(F.max_pool2d, ceil_mode=True),
            ("max", 3): partial(F.max_pool3d, ceil_mode=True),
            ("mean", 2): partial(F.avg_pool2d, ceil_mode=True, count_include_pad=False),
            ("mean", 3): partial(F.avg_pool3d, ceil_mode=True, count_include_pad=False),
        }[self.pooling, len(positions)]
        pooled = pool(gradients.flatten(0, 1), self.block, self.block)
        for axis, n in enumerate(positions, 2):
            pooled = pooled.repeat_interleave(self.block, axis).narrow(axis, 0, n)
        return activations * pooled.unflatten(0, gradients.shape[:2])


def _positive_product(activations: Tensor, gradients: Tensor) -> Tensor:
    return activations * gradients.relu()
