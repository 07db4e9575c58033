"""Add a perturbation method: slabs of the image replaced, one after the other."""

import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai import Explainer
from esegeta_monai.methods import Boxes, Explained, Objective, PerturbationMethod, baseline_for, score_changes


class SlabOcclusion(PerturbationMethod):
    """``a(v) = F(x) − F(x with the slab of v replaced)``, for slabs across the first axis of the image.

    Args:
        thickness: of a slab, in voxels.
        baseline: what replaces a slab, see `esegeta_monai.engine.baselines`.
    """

    units = "change of the target when the voxel's slab is replaced"
    thickness: int = 4
    baseline: str | float = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thickness < 1:
            raise ValueError(f"thickness={self.thickness}: give at least 1 voxel")

    def perturbations(self, objective: Objective) -> Boxes:
        """One box for each slab."""
        n, *others = objective.image.shape[1:]
        reference = baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        starts = [(i, *[0] * len(others)) for i in range(0, n, self.thickness)]
        stops = [(min(i + self.thickness, n), *others) for i, *_ in starts]
        return Boxes(starts, stops, reference)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        slabs = self.perturbations(objective)
        drops = -score_changes(objective, slabs).to(objective.image)
        maps = objective.new_maps()
        for slab, drop in zip(slabs.boxes, drops.T):
            maps[:, :, slab[0]] = drop.reshape(-1, *(1,) * (maps.ndim - 1))
        return Explained(maps)


if __name__ == "__main__":
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.Tanh()).double()
    image, inferer = torch.rand(1, 1, 12, 8, dtype=torch.float64), SlidingWindowInferer((6, 6), overlap=0.5)
    (attribution,) = Explainer(network, inferer)(image, [SlabOcclusion(baseline=0.0)], ["MultiClassMask(1)"])

    mask = inferer(image, network)[0].argmax(0) == 1
    for first in (0, 4, 8):  # the whole image again for every slab, by MONAI's inferer
        changed = image.index_fill(2, torch.arange(first, first + 4), 0.0)
        drop = (inferer(image, network) - inferer(changed, network)).detach()[0, 1][mask].sum()
        torch.testing.assert_close(attribution.map[0, first, 0].as_tensor(), drop)
        print(f"rows {first} to {first + 3}: the target loses {float(drop):+.6f}")
