"""Objects pasted on scenes, in 2D and 3D: the class of the object and of the scene are drawn independently."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

SIZE, OBJECT = 12, 4


@dataclass(frozen=True)
class Scenes:
    """Images (n, 1, *spatial) with an object and without it, the object's mask (n, *spatial), both classes (n,)."""

    images: Tensor
    empty: Tensor
    masks: Tensor
    objects: Tensor
    scenes: Tensor


def scenes(count: int, dims: int, seed: int) -> Scenes:
    """Scenes are waves along the first axis or the second; objects are solid, or hollow with a bright rim."""
    rng = np.random.default_rng(seed)
    shape = (SIZE,) * dims
    at = np.stack(np.meshgrid(*[np.arange(SIZE)] * dims, indexing="ij"))
    scene, kind = rng.integers(0, 2, count), rng.integers(0, 2, count)
    empty = np.stack([
        0.5 * np.sin(2 * np.pi * at[s] / 4 + rng.uniform(0, 2 * np.pi)) + rng.normal(0, 0.1, shape) for s in scene
    ])  # fmt: skip
    images, masks = empty.copy(), np.zeros((count, *shape), dtype=bool)
    for n, k in enumerate(kind):
        start = rng.integers(0, SIZE - OBJECT, dims)
        box = tuple(slice(s, s + OBJECT) for s in start)
        inner = tuple(slice(s + 1, s + OBJECT - 1) for s in start)
        masks[(n, *box)] = True
        images[(n, *box)] = 0.8
        images[(n, *inner)] = -0.8 if k else 0.8
    tensors = [torch.from_numpy(v[:, None]).float() for v in (images, empty)]
    return Scenes(*tensors, torch.from_numpy(masks), torch.from_numpy(kind), torch.from_numpy(scene))


def network(dims: int, seed: int) -> nn.Module:
    conv, pool = (nn.Conv2d, nn.AdaptiveMaxPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveMaxPool3d)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(conv(1, 8, 3, padding=1), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(8, 2))


def fitted(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 150, seed: int = 0) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    return model.eval()


@cache
def pair(dims: int) -> tuple[nn.Module, nn.Module]:
    """A network that has learned the objects, and one that has learned the scenes."""
    data = scenes(160, dims, 0)
    return fitted(network(dims, 0), data.images, data.objects), fitted(network(dims, 1), data.images, data.scenes)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())
