"""Class activation maps without gradients: channels are used as masks or switched off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.default_layer import LayerShape, default_layer
from esegeta_monai.engine.layer_frames import channel_axis
from esegeta_monai.engine.layer_maps import BlendedActivations
from esegeta_monai.engine.network.hooks import replaced
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.engine.windows.plan import Slices
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.cam.gradient_cam import LayerPasses, _Cam
from esegeta_monai.methods.cam.requests import ChannelMoments, Moments

__all__ = ["AblationCam", "ScoreCam"]


class _ChannelByChannel(_Cam):
    """Base class; ``max_channels`` limits the cost to the channels of greatest variance."""

    max_channels: int | None = None

    needs_gradient = False
    cheap_parameters = (("max_channels", 16),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_channels is not None and self.max_channels < 1:
            raise UsageError(f"max_channels={self.max_channels}: give at least 1, or None for all channels")

    @property
    def passes_exact(self) -> bool:
        return False

    def passes(self, objective: Objective) -> int:
        """Count the activations of all windows twice, and per channel the windows that the target sees."""
        return 2 * len(objective.plan) + self.channel_count(objective) * len(objective.windows)

    def channel_count(self, objective: Objective) -> int:
        """Return the number of channels that are tested; 64 if the layer's shape is not known."""
        shapes: dict[str, LayerShape] = objective.memo("layer shapes", dict) if objective.knows("layer shapes") else {}
        layer = default_layer(objective) if self.layer is None and objective.knows("default layer") else self.layer
        grid = shapes[layer].grid if layer in shapes else None
        channels = 64 if grid is None else grid[0]
        return channels if self.max_channels is None else min(channels, self.max_channels)

    def chosen(self, moments: ChannelMoments) -> list[int]:
        """Return the channels that are used, in order; constant ones are left out."""
        mean = moments.first / moments.count
        variance = moments.second.diagonal() / moments.count - mean**2
        order = variance.argsort(descending=True, stable=True)[: self.max_channels].tolist()
        return sorted(c for c in order if variance[c] > 0)


class ScoreCam(_ChannelByChannel):
    """``ReLU(Σ_c α_c A_c)``, α the softmax over channels of F with the image masked by the channel (Wang et al.
    2020): ``α = softmax_c F(x₀ + H_c (x − x₀))``, H_c the activation on the image's grid, scaled to [0, 1].

    The softmax is not invariant to scale, so a target that is a sum over voxels enters it as its mean.

    Args:
        layer, relu: see `GradCam`.
        max_channels: use only this many channels, those of greatest variance: Faster-Score-CAM (Li et al. 2020).
        baseline: x₀, see `esegeta_monai.engine.baselines`; the paper has ``"zero"``.

    Memory: one volume per channel that is used.
    """

    call_by_call = True
    reference = "Wang et al., CVPR workshop 2020, arXiv:1910.01279"

    baseline: Any = "auto"

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        if self.max_channels is None:
            maps: Tensor = yield BlendedActivations(layer)
        else:
            moments: ChannelMoments = yield Moments(layer)
            one_hot = torch.eye(len(moments.first))[self.chosen(moments)]
            maps = (yield BlendedActivations(layer, one_hot))[:, 0]
        low, high = (f(maps.flatten(1), 1).reshape(-1, *(1,) * (maps.ndim - 1)) for f in (torch.amin, torch.amax))
        varied = (high > low).flatten()
        if not bool(varied.any()):
            raise MethodError(f"all channels of layer {layer!r} are constant over the image: choose another layer")
        masks = ((maps - low) / (high - low))[varied]
        x0 = baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        changes = score_changes(objective, _Masks(masks, x0))
        weights = (changes / _voxels(objective)[:, None]).softmax(1)
        return torch.einsum("kc,c...->k...", weights.to(maps), maps[varied])[:, None]


class _Masks(Perturbations):
    """``x₀ + H_c (x − x₀)`` for masks H (m, *spatial)."""

    def __init__(self, masks: Tensor, baseline: Tensor) -> None:
        self.masks, self.baseline = masks, baseline

    def __len__(self) -> int:
        return len(self.masks)

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        there: tuple[Any, ...] = (slice(None), *place)
        return torch.lerp(self.baseline[there].to(crop), crop, self.masks[index][place].to(crop).expand_as(crop))


def _voxels(objective: Objective) -> Tensor:
    """Return the number of voxels that each target sums over, (k,)."""
    return torch.tensor([s.voxels if getattr(s, "reduction", "mean") == "sum" else 1 for s in objective.scores])


class AblationCam(_ChannelByChannel):
    """``ReLU(Σ_c w_c A_c)`` with ``w_c = (F − F_c) / |F|``, F_c the target with channel c of the layer set to zero
    (Desai & Ramaswamy 2020; the absolute value, since a logit may be negative).

    Args:
        layer, relu: see `GradCam`.
        max_channels: use only this many channels, those of greatest variance.
    """

    call_by_call = True
    reference = "Desai & Ramaswamy, WACV 2020, doi:10.1109/WACV45572.2020.9093360"

    def passes(self, objective: Objective) -> int:
        """Count the passes of all channels, and those of F with all channels."""
        return super().passes(objective) + len(objective.windows)

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        moments: ChannelMoments = yield Moments(layer)
        value = objective.value(objective.image[None])[:, 0]  # in the precision of the values compared with it
        weights = torch.zeros((objective.n_targets, len(moments.first)), dtype=torch.float64)
        for c in self.chosen(moments):
            with replaced(objective.model.network, layer, _without(objective, layer, c)):
                without = objective.value(objective.image[None])[:, 0]
            weights[:, c] = ((value - without) / torch.where(value == 0, 1.0, value.abs())).cpu()
        return (yield BlendedActivations(layer, weights))


def _without(objective: Objective, layer: str, channel: int) -> Any:
    def edit(values: Tensor) -> Tensor:
        edited = values.clone()
        edited.select(channel_axis(objective, layer), channel).zero_()
        return edited

    return edit
