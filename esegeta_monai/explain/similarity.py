"""SVCCA: how similar two layers represent the same scans, between layers, networks or epochs of a training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_frames import spatial_map
from esegeta_monai.engine.network.hooks import capture, find_layer
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import evaluating, frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.errors import InputError, UsageError

__all__ = ["layer_svcca", "svcca"]


def svcca(first: Tensor, second: Tensor, variance: float = 0.99) -> float:
    """Compute the mean canonical correlation of two representations, 0 to 1 (Raghu et al. 2017, arXiv:1706.05806).

    Each one is centred and reduced to the directions of greatest variance that together have the share ``variance``.
    The result does not change under invertible linear maps of the reduced channels, and is 1 for the same subspace. It
    is biased upwards with few samples: give at least ten for each channel.

    Args:
        first: (n, C), one row for each position.
        second: (n, D), the same positions.
        variance: share of the variance that is kept, in (0, 1].

    Raises:
        UsageError: the numbers of rows differ, or ``variance`` is outside of (0, 1].
        InputError: a representation is constant, or has fewer positions than directions.

    >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    >>> round(svcca(x, x @ torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), 1.0), 6)
    1.0
    """
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or not 0 < variance <= 1:
        raise UsageError(
            f"svcca: representations of shape {tuple(first.shape)} and {tuple(second.shape)} need the same rows, and "
            f"variance={variance} must be in (0, 1]"
        )
    bases = [_directions(values, variance) for values in (first, second)]
    directions = sum(b.shape[1] for b in bases)
    if directions > len(first) - 1:  # two subspaces of the centred positions then meet, whatever they are
        raise InputError(
            f"svcca: {len(first)} positions are too few for {directions} directions: unrelated representations would "
            "agree; give more scans"
        )
    correlations = torch.linalg.svdvals(bases[0].mT @ bases[1]).clamp(max=1)
    return float(correlations.mean())


def _directions(values: Tensor, variance: float) -> Tensor:
    """Return an orthonormal basis (n, r) of the strongest directions of a representation (n, C)."""
    centred = values.double() - values.double().mean(0)
    left, strengths, _ = torch.linalg.svd(centred, full_matrices=False)
    shares = strengths.square().cumsum(0) / strengths.square().sum()
    if not bool(shares.isfinite().all()) or float(strengths[0]) == 0:
        raise InputError("svcca: a representation is constant: choose another layer, or other scans")
    real = strengths > 1e-10 * strengths[0]  # others are rounding
    keep = int((shares < variance * (1 - 1e-12)).sum()) + 1
    return left[:, : min(keep, int(real.sum()))]


def layer_svcca(
    networks: Sequence[nn.Module],
    layers: Sequence[str],
    images: Sequence[Tensor],
    inferer: object = None,
    variance: float = 0.99,
) -> float:
    """Compute the `svcca` of two layers over all positions of all windows of some scans.

    Args:
        networks: two networks (the same twice for two layers of one), such as two epochs of a training.
        layers: dotted name of the layer in each.
        images: scans (C, *spatial), preprocessed.
        inferer: as for `Explainer`; None: the network sees a scan at once.
        variance: see `svcca`.

    The layer of the finer grid is averaged over the cells of the coarser one.

    Raises:
        UsageError: other numbers than two, or no such layer.
        MethodError: a layer has no spatial map.
        InputError: see `svcca`.

    >>> network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1))
    >>> layer_svcca([network, network], ["0", "0"], [torch.rand(1, 16, 16)])
    1.0
    """
    if len(networks) != 2 or len(layers) != 2 or not images:
        raise UsageError("layer_svcca compares two layers: give two networks, two layers, and at least one scan")
    rows: list[list[Tensor]] = [[], []]
    for image in images:
        maps = [_activations(n, layer, image, inferer) for n, layer in zip(networks, layers)]
        for pair in zip(*maps):
            grid = min((m.shape[2:] for m in pair), key=torch.Size.numel)
            for side, values in zip(rows, pair):
                small = values if values.shape[2:] == grid else F.interpolate(values, size=grid, mode="area")
                side.append(small.movedim(1, -1).flatten(0, -2).double().cpu())
    first, second = (torch.cat(side) for side in rows)
    return round(svcca(first, second, variance), 12)


def _activations(network: nn.Module, layer: str, image: Tensor, inferer: object) -> list[Tensor]:
    """Return the maps (n, C, *positions) of a layer in each batch of windows."""
    find_layer(network, layer)
    parameter = next(network.parameters(), torch.empty(0))
    model = Model(network, parameter.device)
    plan = plan_windows(as_inferer(inferer), image.shape[1:], image.dtype)
    objective = Objective(model, image, plan)
    maps: list[Tensor] = []

    def run(batch: Batch) -> None:
        with torch.inference_mode(), capture(network, [layer]) as captured:
            objective.run(batch.image, batch.windows, all_channels=True)
        maps.append(batch.unmirrored(spatial_map(captured[layer], objective, layer)))

    with frozen(network), evaluating(network, model.device):
        objective.each([(0, w) for w in range(len(plan))], run, with_cotangents=False)
    return maps
