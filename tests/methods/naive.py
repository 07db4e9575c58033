"""The naive computation of every perturbation: a copy of the whole volume through MONAI's own inferer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.masks import Segments, SmoothMasks
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.methods.cam.perturbation_cam import _Masks as Masks
from esegeta_monai.targets import Case, MultiClassMask, Target, Voxel


class Small(nn.Module):
    """Convolutions with an instance norm (each voxel depends on its whole window) or a batch norm in between."""

    def __init__(self, dims: int, channels: int, norm: str) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        norms = {
            ("instance", 2): nn.InstanceNorm2d,
            ("instance", 3): nn.InstanceNorm3d,
            ("batch", 2): nn.BatchNorm2d,
            ("batch", 3): nn.BatchNorm3d,
        }
        self.a = conv(channels, 5, 3, padding=1)
        self.n = norms[norm, dims](5, affine=True)
        self.b = conv(5, 3, 3, padding=1)
        with torch.no_grad():
            for name, value in [*self.n.named_parameters(), *self.n.named_buffers()]:
                if value.is_floating_point():
                    value.copy_(torch.rand_like(value) + (0.5 if "var" in name or name == "weight" else 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.n(self.a(x))))


def small(dims: int = 2, channels: int = 1, norm: str = "instance") -> nn.Module:
    torch.manual_seed(10 * dims + channels)
    return Small(dims, channels, norm).double().eval()


def image_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Naive:
    """An objective, and the same by whole volumes. Padded along the first axis, blended along the last."""

    def __init__(
        self, net: nn.Module, image: Tensor, targets: list[Target] | None = None, inferer=None, seed: int = 3
    ) -> None:
        dims = image.ndim - 1
        self.net, self.image = net, image
        self.inferer = as_inferer(inferer or SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian"))
        prediction = self.predict(image)
        targets = targets or [MultiClassMask(1)]
        self.scores = [s for t in targets for s in t.bind(prediction, Case())]
        plan = plan_windows(self.inferer, image.shape[1:], image.dtype)
        model = Model(net, torch.device("cpu"))
        self.objective = Objective(model, image, plan, self.scores, prediction, seed=seed)

    def predict(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return self.inferer(image[None], self.net)[0]

    def value(self, image: Tensor) -> Tensor:
        """F (k,)."""
        prediction = self.predict(image)
        return torch.stack([s.value(s.crop(prediction)) for s in self.scores])

    def change(self, objective: Objective, perturbations: Perturbations) -> Tensor:
        """`esegeta_monai.engine.perturbation.scoring.score_changes`, from what describes the perturbations alone."""
        base = self.value(self.image)
        values = [self.value(perturbed(perturbations, i, self.image)) - base for i in range(len(perturbations))]
        return torch.stack(values, 1)


def perturbed(perturbations: Perturbations, i: int, image: Tensor) -> Tensor:
    """The whole perturbed volume, built without the code under test."""
    if isinstance(perturbations, Boxes):
        gone = torch.zeros(image.shape, dtype=torch.bool)
        channels = slice(None) if perturbations.channels is None else list(perturbations.channels[i])
        gone[(channels, *perturbations.boxes[i])] = True
        return torch.where(gone, torch.as_tensor(perturbations.baseline, dtype=image.dtype), image)
    if isinstance(perturbations, Masks):
        return perturbations.masks[i] * image + (1 - perturbations.masks[i]) * perturbations.baseline
    if isinstance(perturbations, Segments):
        off = np.flatnonzero(~perturbations.coalitions[i])
        gone = torch.from_numpy(np.isin(perturbations.labels.numpy(), off))
        return torch.where(gone, perturbations.baseline, image)
    assert isinstance(perturbations, SmoothMasks)
    mask = whole_mask(perturbations, i)
    return perturbations.baseline + mask * (image - perturbations.baseline)


def whole_mask(masks: SmoothMasks, i: int) -> Tensor:
    mode = {2: "bilinear", 3: "trilinear"}[len(masks.shape)]
    grown = F.interpolate(masks.grids[i][None, None], masks.extent, mode=mode, align_corners=False)[0, 0]
    return grown[tuple(slice(s, s + n) for s, n in zip(masks.shifts[i].tolist(), masks.shape))]


def two_targets(output: str) -> list[Target]:
    return [MultiClassMask(1, output=output), Voxel(0, index=(2, 3), output=output)]
