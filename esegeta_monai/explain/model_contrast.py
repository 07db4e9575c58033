"""BAM (Yang & Kim 2019, arXiv:1907.09701): whether maps show which part of an image a network uses.

Objects are pasted on scenes. One network has learned the objects, another the scenes; both see the same images. The
attribution of the object's region should be high only for the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.errors import InputError, UsageError

__all__ = [
    "input_dependence_rate",
    "input_independence_rate",
    "insignificant_patch",
    "model_contrast_score",
    "region_attribution",
]

CLIP = 0.99
"""Quantile of the absolute map that becomes 1."""


def region_attribution(maps: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Return ``g``, the mean over a region of each map, absolute, over its 99 % quantile and at most 1.

    Channels are summed after the absolute value is taken.

    Args:
        maps: (C, *spatial).
        masks: the region of each, above 0 (*spatial).

    Returns:
        (n,), float64, 0 to 1; a map of zeros has 0.

    Raises:
        InputError: numbers or shapes differ, or a region is empty.

    >>> region_attribution([torch.tensor([[0.0, -2.0, 1.0, 1.0]])], [torch.tensor([0, 1, 1, 0])]).round(decimals=2)
    tensor([0.7600], dtype=torch.float64)
    """
    if len(maps) != len(masks) or not maps:
        raise InputError(f"{len(maps)} maps and {len(masks)} regions: give one region for each map")
    values = []
    for number, (attribution, mask) in enumerate(zip(maps, masks)):
        strength = torch.as_tensor(attribution).as_subclass(Tensor).detach().double().abs().sum(0)
        inside = torch.as_tensor(mask).as_subclass(Tensor).to(strength.device) > 0
        if inside.shape != strength.shape or not bool(inside.any()):
            raise InputError(
                f"region {number} has the shape {tuple(inside.shape)} for a map of {tuple(strength.shape)}, or no "
                "voxel: give the object's mask on the map's grid"
            )
        top = torch.quantile(strength.flatten(), CLIP) if strength.numel() < 2**24 else strength.max()
        top = top if top > 0 else strength.max()
        scaled = (strength / top).clamp(max=1) if top > 0 else strength
        values.append(scaled[inside].mean().cpu())
    return torch.stack(values)


def model_contrast_score(object_maps: Sequence[Tensor], scene_maps: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """Compute MCS, the mean of ``g(network of objects) − g(network of scenes)`` over images, −1 to 1; 0 is chance.

    Args:
        object_maps: maps (C, *spatial) of the network that has learned the objects.
        scene_maps: of the network that has learned the scenes, for the same images.
        masks: the object's region in each image (*spatial).

    Give only images that both networks classify correctly.

    Raises:
        InputError: see `region_attribution`.
    """
    return float((region_attribution(object_maps, masks) - region_attribution(scene_maps, masks)).mean())


def input_dependence_rate(with_object: Sequence[Tensor], without: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    """Compute IDR, the share of images whose region has less attribution with the object than without it, 0 to 1.

    For the network of scenes, which the object only hides a part of; one half is chance, 1 is best.

    Args:
        with_object: maps (C, *spatial) of scenes with an object.
        without: maps of the same scenes without it.
        masks: the object's region (*spatial).

    Raises:
        InputError: see `region_attribution`.
    """
    return float((region_attribution(with_object, masks) < region_attribution(without, masks)).double().mean())


def input_independence_rate(
    with_patch: Sequence[Tensor], without: Sequence[Tensor], masks: Sequence[Tensor], threshold: float = 0.1
) -> float:
    """Compute IIR, the share of images whose region keeps its attribution to ``threshold`` under a patch, 0 to 1.

    The patch (`insignificant_patch`) changes the image and not the network's output: ``|g(x + δ) − g(x)| ≤ t g(x)``.

    Args:
        with_patch: maps (C, *spatial) of images with the patch.
        without: maps of the images.
        masks: the patch's region (*spatial).
        threshold: t, above 0.

    Raises:
        InputError: see `region_attribution`.
        UsageError: the threshold is not above 0.
    """
    if not threshold > 0:
        raise UsageError(f"threshold={threshold}: give a number above 0")
    before = region_attribution(without, masks)
    change = (region_attribution(with_patch, masks) - before).abs()
    return float((change <= threshold * before).double().mean())


def insignificant_patch(
    network: nn.Module, image: Tensor, mask: Tensor, size: float, *, n_iter: int = 200, lr: float = 0.05, seed: int = 0
) -> Tensor:
    """Return an image with a patch that the network ignores: ``min over δ of |f(x + δ) − f(x)|²``, ``rms(δ) = size``.

    δ is zero outside of the mask. The search stays on the sphere of that size, where BAM weighs the size against the
    change of the output.

    Args:
        network: maps (1, C, *spatial) to (1, K).
        image: (C, *spatial).
        mask: region of the patch, above 0 (*spatial).
        size: root mean square of δ in the region, in intensities of the image.
        n_iter, lr: steps of Adam; seed: of the start.

    Returns:
        ``x + δ`` (C, *spatial) of the smallest change that was seen.

    Raises:
        InputError: the region is empty.
        UsageError: ``size`` or ``n_iter`` is not above 0.

    >>> flat = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    >>> x, region = torch.rand(1, 4, 4), torch.ones(4, 4)
    >>> y = insignificant_patch(flat, x, region, 1.0)
    >>> bool((flat(y[None]) - flat(x[None])).abs().max() < 1e-2), round(float((y - x).square().mean().sqrt()), 4)
    (True, 1.0)
    """
    if not size > 0 or n_iter < 1:
        raise UsageError(f"size={size}, n_iter={n_iter}: give numbers above 0")
    plain = image.as_subclass(Tensor).detach()
    inside = (torch.as_tensor(mask).as_subclass(Tensor).to(plain.device) > 0).expand_as(plain)
    if not bool(inside.any()):
        raise InputError("the region of the patch has no voxel")
    drawn = torch.randn(plain.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    free = drawn.to(plain).requires_grad_(True)
    optimizer = torch.optim.Adam([free], lr=lr)

    def patched() -> Tensor:
        delta = torch.where(inside, free, 0)
        return plain + delta * size / delta.square().sum().div(inside.sum()).sqrt()

    best, smallest = plain, float("inf")
    with evaluating(network, plain.device):
        before = network(plain[None]).detach()
        for step in range(n_iter + 1):
            now = patched()
            change = (network(now[None]) - before).square().sum()
            if float(change.detach()) < smallest:
                best, smallest = now.detach(), float(change.detach())
            if step < n_iter:
                (free.grad,) = torch.autograd.grad(change, free)
                optimizer.step()
    return best
