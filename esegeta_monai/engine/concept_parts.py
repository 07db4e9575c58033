"""F with the parts of a layer's activations that concepts explain made weaker: A' = A − Σ_j (1 − m_j) u_j W_j.

u_j ≥ 0 is the non-negative least-squares weight of concept j at each position of the layer, so that what no concept
explains stays as it is and F at m = 1 is F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_frames import spatial_map
from esegeta_monai.engine.layer_maps import check_one_member
from esegeta_monai.engine.network.hooks import capture, replaced
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError

__all__ = ["nonnegative_weights", "weakened_values"]

SWEEPS, CONVERGED = 500, 1e-12


def nonnegative_weights(values: Tensor, basis: Tensor) -> Tensor:
    """Return ``argmin_{u ≥ 0} |a − Σ_j u_j W_j|²`` for each row a, by coordinate descent.

    Args:
        values: (n, C), float64.
        basis: W (k, C), rows that are not zero.

    Returns:
        (n, k).

    >>> nonnegative_weights(torch.tensor([[2.0, -1.0]]), torch.eye(2)).tolist()
    [[2.0, 0.0]]
    """
    gram, along = basis @ basis.T, values @ basis.T
    weights = torch.zeros_like(along)
    for _ in range(SWEEPS):
        change = 0.0
        for j in range(len(basis)):
            step = (along[:, j] - weights @ gram[:, j]) / gram[j, j]
            new = (weights[:, j] + step).clamp(min=0)
            change = max(change, float((new - weights[:, j]).abs().max()))
            weights[:, j] = new
        if change <= CONVERGED * float(weights.abs().max()):
            break
    return weights


def weakened_values(objective: Objective, layer: str, basis: Tensor, factors: Tensor) -> Tensor:
    """Return F where the part of each concept at a layer is multiplied by a factor.

    Args:
        objective: with linear scores.
        layer: dotted name of a layer that runs once.
        basis: W (k, C), or (k, 2C) of positive and negative parts, ``A⁺ − A⁻ = A``.
        factors: m (designs, k); 1 leaves a concept as it is, 0 removes it.

    Returns:
        (targets, designs), float64. It takes ``designs + 1`` passes of the windows that targets see.

    Raises:
        MethodError: a score is not linear, or the layer has another number of channels or no map.
    """
    if not objective.linear:
        raise MethodError("the effect of concepts needs a linear target: use output='logit'")
    check_one_member(objective)
    sums = torch.zeros(objective.n_targets, len(factors), dtype=torch.float64)
    network = objective.model.network

    def run(batch: Batch) -> None:
        with torch.no_grad():
            with capture(network, [layer]) as captured:
                batch.forward(batch.image)
            raw = captured[layer]
            activations = spatial_map(raw, objective, layer).double()
            n, channels = activations.shape[:2]
            if basis.shape[1] not in (channels, 2 * channels):
                raise MethodError(
                    f"layer {layer!r} has {channels} channels, the concepts {basis.shape[1]}: they are of another layer"
                )
            rows, on = activations.movedim(1, -1).reshape(-1, channels), basis.to(activations)
            apart = basis.shape[1] == 2 * channels
            weights = nonnegative_weights(torch.cat([rows.relu(), (-rows).relu()], 1) if apart else rows, on)
            directions = on[:, :channels] - on[:, channels:] if apart else on
            for number, factor in enumerate(factors.to(activations)):
                lost = (weights * (1 - factor)) @ directions
                change = lost.reshape(n, *activations.shape[2:], channels).movedim(-1, 1)
                at_layer = _to_raw(change.to(raw.dtype), raw, objective, layer)
                with replaced(network, layer, lambda a, at_layer=at_layer: a - at_layer):  # type: ignore[misc]
                    out = batch.forward(batch.image)
                sums[:, number] += batch.scores(out).sum(1).cpu()

    objective.each(objective.jobs(1), run, sums=[sums])
    return sums + objective.constants()[:, None]


def _to_raw(change: Tensor, raw: Tensor, objective: Objective, layer: str) -> Tensor:
    """Put a change of a layer's map (n, C, *positions) into the layer's own shape, that of ``raw`` (n, …).

    The map is a permutation of the layer's entries: its transpose, by autograd, is the inverse; entries without a
    position, such as a class token, do not change.
    """
    with torch.enable_grad():
        entries = torch.zeros_like(raw, requires_grad=True)
        on_map = spatial_map(entries, objective, layer)
        (result,) = torch.autograd.grad(on_map, entries, change)
    return result
