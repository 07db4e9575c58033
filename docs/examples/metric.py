"""Add a metric: how far the centre of a map lies from the centre of the label."""

import torch
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.metrics import Metric, MetricInput, MetricResult, magnitude


class CentreDistance(Metric):
    """Distance between the map's centre of mass, of ``Σ_c |a_c|``, and the label's centre, in mm.

    Args:
        power: exponent of the map's magnitude; larger ones follow the strongest voxels.
    """

    group = "localisation"
    higher_is_better = False
    needs = frozenset({"label", "spacing"})
    meaning = "Distance in mm between the map's centre of mass and the centre of the label; 0 is best."

    power: float = 1.0

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, image diagonal] in mm; undefined for a map of zeros."""
        weights = magnitude(subject.map) ** self.power
        if not weights.any():
            return MetricResult.undefined("the map is zero everywhere")
        assert subject.label is not None  # it is in `needs`
        step = (centre(weights) - centre(subject.label.to(weights))) * weights.new_tensor(subject.spacing)
        return MetricResult(float(step.norm()))


def centre(weights: Tensor) -> Tensor:
    """Compute the centre of mass (d,) in voxels, float64, of weights (*spatial) >= 0 that are not all zero."""
    places = weights.nonzero()
    return (places * weights[tuple(places.T)][:, None]).sum(0) / weights.sum()


if __name__ == "__main__":
    torch.manual_seed(0)
    network = torch.nn.Conv2d(1, 2, 1).double()
    image = torch.zeros(1, 1, 16, 16, dtype=torch.float64)
    image[0, 0, 3, 4] = 1.0  # image times gradient can only be there
    (attribution,) = Explainer(network)(image, ["InputXGradient"], ["Box(1, (0, 0), (16, 16))"])

    label = torch.zeros(16, 16, dtype=torch.bool)
    label[5:8, 8] = True  # its centre lies 3 voxels down and 4 to the right
    found = CentreDistance().update(MetricInput(attribution.map, label=label, spacing=(2.0, 2.0)))
    assert abs(found.value - 10.0) < 1e-12, found.value  # 2 mm times the hypotenuse of 3 and 4
    print(f"{found.value:.1f} mm. {found.meaning}")
