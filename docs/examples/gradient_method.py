"""Add a gradient method: the gradient times the image's deviation from each channel's mean."""

import torch

from esegeta_monai import Explainer
from esegeta_monai.methods import Explained, InputGradient, Method, Objective, Passes


class DeviationXGradient(Method):
    """Deviation times gradient: ``a(v) = scale · (x(v) − mean_c) · ∂F/∂x(v)``.

    For a network that is linear in its input the sum of the map is ``scale · (F(x) − F(mean))``.

    Args:
        scale: factor of the map, without unit.
    """

    reference = "Kindermans et al. 2016, arXiv:1611.07270 (with the mean in place of zero)"
    produces = "input map"
    additive = True
    units = "target per voxel"

    scale: float = 1.0

    def attribute(self, objective: Objective) -> Passes:
        """(k, C, *spatial)."""
        gradient = yield InputGradient()
        image = objective.image
        mean = image.flatten(1).mean(1).reshape(-1, *(1,) * (image.ndim - 1))
        return Explained(self.scale * (image - mean) * gradient.maps[:, 0])


if __name__ == "__main__":
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 2, 3, padding=1).double()  # linear: the sum of the map is known
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    (attribution,) = Explainer(network)(image, [DeviationXGradient()], ["MultiClassMask(1)"])

    with torch.no_grad():
        mask = network(image)[0].argmax(0) == 1
        difference = (network(image) - network(image.mean().expand_as(image)))[0, 1][mask].sum()
    torch.testing.assert_close(attribution.map.sum().as_tensor(), difference)
    print(f"sum of the map {float(attribution.map.sum()):.6f} = F(x) - F(mean) {float(difference):.6f}")
