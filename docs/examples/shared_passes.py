"""Yield requests: a class activation map that shares every pass over the windows with Grad-CAM."""

import torch

from esegeta_monai import Explainer
from esegeta_monai.methods import BlendedActivations, ChannelGradients, Explained, GradCam, Method, Objective, Passes


class PositiveCam(Method):
    """``Σ_c max(α_c, 0) A_c`` with α_c the mean of ``∂F/∂A_c`` over the layer's positions.

    Args:
        layer: dotted name of the layer whose output is A.
    """

    produces = "layer map"
    additive = False
    units = "weighted activation"

    layer: str

    def attribute(self, objective: Objective) -> Passes:
        """(k, 1, *spatial)."""
        weights = yield ChannelGradients(self.layer)  # (k, C), once the sweep over the windows is complete
        maps = yield BlendedActivations(self.layer, weights.clamp(min=0))
        return Explained(maps)

    def passes(self, objective: Objective) -> int:
        """Gradients where the target sees, activations everywhere."""
        return len(objective.windows) + len(objective.plan)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer, head = torch.nn.Conv2d(1, 4, 3, padding=1).double(), torch.nn.Conv2d(4, 2, 1).double()
    network, calls = torch.nn.Sequential(layer, torch.nn.ReLU(), head), []
    network.register_forward_hook(lambda *_: calls.append(1))
    image = torch.rand(1, 1, 8, 8, dtype=torch.float64)

    Explainer(network).check(image)  # once per network, with passes of its own
    calls.clear()
    grad_cam, positive = GradCam(layer="0"), PositiveCam("0")
    list(Explainer(network)(image, [grad_cam], ["MultiClassMask(1)"]))  # this also traces the layers, once
    calls.clear()
    list(Explainer(network)(image, [grad_cam], ["MultiClassMask(1)"]))
    alone = len(calls)
    _, attribution = Explainer(network)(image, [grad_cam, positive], ["MultiClassMask(1)"])
    assert len(calls) - alone == alone, calls  # the second method costs no pass

    activations = layer(image)
    logits = head(activations.relu())[0]
    (gradients,) = torch.autograd.grad(logits[1][logits.argmax(0) == 1].sum(), activations)
    weights = gradients.mean((2, 3), keepdim=True).clamp(min=0)
    torch.testing.assert_close(attribution.map.as_tensor(), (weights * activations.detach()).sum(1))
    print(
        f"{alone} forward passes for one method, {len(calls) - alone} for two; mean {float(attribution.map.mean()):.4f}"
    )
