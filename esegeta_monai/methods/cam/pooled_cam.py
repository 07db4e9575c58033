"""The first class activation map: the weights of a head that follows global average pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esegeta_monai.engine.default_layer import layer_shapes
from esegeta_monai.engine.layer_frames import frames_of, map_of_last_call, traced_layers
from esegeta_monai.engine.layer_maps import BlendedActivations
from esegeta_monai.engine.network.hooks import capture, find_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError
from esegeta_monai.methods.cam.gradient_cam import LayerPasses, _Cam

__all__ = ["Cam"]

Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Cam(_Cam):
    """``Σ_c w_c A_c`` where the network ends as ``Σ_c w_c mean(A_c) + b``: global average pooling and one linear layer
    (Zhou et al. 2016). The mean of the layer's map plus the bias is the logit.

    Args:
        layer: the layer that is pooled; None: it is detected.
        relu: keep positive values only.
    """

    call_by_call = True
    reference = "Zhou et al., CVPR 2016, arXiv:1512.04150"
    needs_linear = True
    needs_gradient = False

    relu: bool = False

    def passes(self, objective: Objective) -> int:
        """Count one pass per window for the activations, one to find the head, and one to find the layer."""
        calls = objective.plan.call_count
        choice = int(self.layer is None) + (calls if calls > 1 else 0)
        return len(objective.plan) + 1 + choice

    def layers(self, objective: Objective) -> tuple[str, ...]:
        if self.layer is None:
            return (_pooled_layer(objective, None)[0],)
        names = (self.layer,) if isinstance(self.layer, str) else tuple(dict.fromkeys(self.layer))
        for name in names:
            find_layer(objective.model.network, name)
            frames_of(objective, name)
        return names

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        _, head = _pooled_layer(objective, layer)
        rows = head.weight.flatten(1)
        weights = [s.cotangent(rows.new_zeros(len(s.channels))) @ rows[list(s.channels)] for s in objective.scores]
        return (yield BlendedActivations(layer, torch.stack(weights), last=True))


def _has_map(objective: Objective, layer: str) -> bool:
    frame = traced_layers(objective)[layer].frames[-1]
    return frame is not None and not frame.fixed


def _pooled_layer(objective: Objective, layer: str | None) -> tuple[str, Head]:
    """Return the layer whose mean over positions enters the last linear layer, and that linear layer.

    The last call of a layer is compared and read.

    Raises:
        MethodError: the network does not end with global average pooling and one linear layer.
    """
    network = objective.model.network
    wrong = (
        "Cam needs a network that ends in global average pooling, over more than one position, and one linear layer: "
        "use GradCam or HiResCam"
    )
    if objective.grid.shape:
        raise MethodError(f"{wrong} (the output of this network is a map of voxels)")
    heads = {n: m for n, m in network.named_modules() if isinstance(m, Head)}
    names = [layer] if layer else [s.name for s in layer_shapes(objective) if s.name and _has_map(objective, s.name)]
    entered: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, n=n: entered.update({n: args[0]}))
        for n, module in heads.items()
    ]
    x = objective.window(0)
    try:
        layers = list(dict.fromkeys([*names, *heads]))
        with torch.inference_mode(), capture(network, layers, of_windows=False) as captured:
            out = objective.run(x, [0], all_channels=True)
    finally:
        for handle in handles:
            handle.remove()
    for head in reversed(list(entered)):
        if len(captured.each[head]) > 1:
            continue
        if captured[head].numel() != out.numel() or not torch.equal(captured[head].flatten(), out.flatten()):
            continue
        pooled = entered[head].flatten()
        for name in reversed(names):
            values = map_of_last_call(captured.each[name], objective, name).flatten(2)[0]
            same = values.shape[0] == len(pooled) and values.shape[1] > 1
            if same and float((values.mean(1) - pooled).abs().max()) <= 1e-5 * float(values.abs().max()):
                return name, heads[head]
    raise MethodError(wrong if layer is None else f"{wrong}; layer {layer!r} is not the pooled layer")
