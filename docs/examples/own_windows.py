"""Declare the windows of an inferer of your own: TorchIO's GridSampler and GridAggregator."""

import torch

from esegeta_monai import Explainer
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.explain import EnsembleInferer


class GridWindows:
    """The windows of a TorchIO ``GridSampler``, whose outputs ``GridAggregator(overlap_mode="average")`` averages.

    Args:
        locations: ``sampler.locations``, (n, 6): first voxel, and the voxel after the last, of each window.
    """

    def __init__(self, locations):
        self.places = [tuple(slice(int(a), int(b)) for a, b in zip(row[:3], row[3:])) for row in locations]

    def declared_windows(self, spatial_shape, dtype):
        """Return the places and the weights of the average; the engine does the rest."""
        roi = tuple(s.stop - s.start for s in self.places[0])
        return WindowPlan(
            spatial_shape, roi, tuple(self.places), ((0, 0),) * 3, importance=torch.ones(roi, dtype=dtype)
        )

    def __call__(self, inputs, network):
        """Predict: sum of the windows' outputs over their number at each voxel."""
        total, count = 0.0, torch.zeros(inputs.shape[2:], dtype=inputs.dtype)
        for place in self.places:
            out = network(inputs[(..., *place)])
            whole = torch.zeros(*out.shape[:2], *inputs.shape[2:], dtype=out.dtype)
            whole[(..., *place)] = out
            total = total + whole
            count[place] += 1
        return total / count


def grid_locations(shape, patch, overlap):
    """Return the locations of TorchIO's sampler, or of the same rule where TorchIO is not installed."""
    try:
        import torchio
    except ImportError:
        axes = []
        for n, p, o in zip(shape, patch, overlap):
            starts = list(range(0, n + 1 - p, p - o))
            axes.append(starts if starts[-1] == n - p else [*starts, n - p])
        grid = torch.cartesian_prod(*(torch.tensor(starts) for starts in axes))
        return torch.cat([grid, grid + torch.tensor(patch)], 1)
    subject = torchio.Subject(image=torchio.ScalarImage(tensor=torch.zeros(1, *shape)))
    return torchio.GridSampler(subject, patch, overlap).locations


if __name__ == "__main__":
    torch.manual_seed(0)
    members = [
        torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv3d(4, 2, 1)).double()
        for _ in range(2)
    ]
    image = torch.rand(1, 1, 13, 12, 10, dtype=torch.float64)
    windows = GridWindows(grid_locations((13, 12, 10), (8, 6, 6), (2, 2, 2)))
    explainer = Explainer(members[0], EnsembleInferer(windows, members))
    (attribution,) = explainer(image, ["VanillaBackprop"], ["MultiClassMask(1)"])

    x = image.clone().requires_grad_(True)  # the whole loop by autograd
    prediction = sum(windows(x, member) for member in members) / 2
    (expected,) = torch.autograd.grad(prediction[0, 1][prediction[0].argmax(0) == 1].sum(), x)
    torch.testing.assert_close(attribution.map.as_tensor(), expected[0], rtol=1e-10, atol=1e-12)
    print(f"{attribution.record['windows_total']} windows of two networks: the map equals autograd through the loop")
