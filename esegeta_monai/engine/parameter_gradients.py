"""``∂F/∂θ``: the gradient of a target with respect to the network's weights, as a sum over windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.network.hooks import find_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, NetworkError

__all__ = ["checkpoint_weights", "flat", "parameter_gradients", "parameters_of", "tracked"]

NO_WEIGHTS = (
    "the target does not depend on the chosen weights by a differentiable path: choose other layers, or a network "
    "whose output is not cut off from them (argmax, round, .detach())"
)


def parameters_of(network: nn.Module, layers: Sequence[str] | None = None) -> list[nn.Parameter]:
    """Return the floating-point weights of a network, in its own order.

    Args:
        network: the network.
        layers: dotted names of the layers whose weights count; None: all.

    Raises:
        UsageError: there is no such layer.
        NetworkError: there is no weight.

    >>> len(parameters_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), ["1"]))
    2
    """
    roots = [network] if layers is None else [find_layer(network, layer) for layer in layers]
    wanted = {id(p) for root in roots for p in root.parameters()}
    chosen = [p for p in network.parameters() if id(p) in wanted and p.is_floating_point()]
    if not chosen:
        raise NetworkError("the network, or the chosen layers, have no weights: name layers with weights")
    return chosen


def checkpoint_weights(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all weights and buffers of a network as a checkpoint has them, ready for `Model.members`.

    Args:
        network: the network; buffers that no state dict has are its own.
        state: a state dict of it, tensors of any shape.

    Raises:
        NetworkError: a weight is missing, or one has another shape.
    """
    own = [*network.named_parameters(), *network.named_buffers()]
    saved = set(network.state_dict())
    weights: dict[str, Tensor] = {}
    for name, value in own:
        given = state.get(name)
        if given is None and name in saved:
            raise NetworkError(f"the checkpoint has no weight {name!r}: give checkpoints of the same network")
        if given is not None and given.shape != value.shape:
            raise NetworkError(
                f"the checkpoint's weight {name!r} has the shape {tuple(given.shape)}, the network's "
                f"{tuple(value.shape)}: give checkpoints of the same network"
            )
        weights[name] = (value if given is None else given).detach().to(value.device, value.dtype).clone()
    return weights


@contextmanager
def tracked(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let autograd follow weights of any shape inside the block; restore their flags afterwards."""
    flags = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in zip(parameters, flags):
            p.requires_grad_(flag)


def flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter], lead: Sequence[int] = ()) -> Tensor:
    """Join gradients (*lead, *shape of each weight) to vectors (*lead, D); None counts as zeros."""
    parts = [
        p.new_zeros((*lead, p.numel())) if g is None else g.detach().reshape(*lead, -1)
        for g, p in zip(gradients, parameters)
    ]
    return torch.cat(parts, -1)


def parameter_gradients(objective: Objective, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Compute ``∂F/∂θ = Σ_w J_wᵀ (ĝ_w ∂s/∂P)`` over windows w, with the cotangent of the blended prediction.

    It equals autograd through the whole inferer, in the memory of one batch of windows. Call it while the network is
    frozen (`esegeta_monai.engine.network.state.evaluating`).

    Args:
        objective: the case, with k targets.
        parameters: weights of its network.

    Returns:
        (k, D), the weights one after the other, in units of the target per unit of weight.

    Raises:
        MethodError: no target depends on the weights.
    """
    total = torch.zeros(
        (objective.n_targets, sum(p.numel() for p in parameters)),
        dtype=objective.model.dtype,
        device=objective.model.device,
    )
    reached = False

    def run(batch: Batch) -> None:
        nonlocal reached
        with tracked(parameters), torch.enable_grad():
            out = batch.forward(batch.image)
            if not out.requires_grad:
                raise MethodError(NO_WEIGHTS)
            gradients = batch.gradients(out, parameters)
        reached = reached or any(g is not None for g in gradients)
        total.add_(flat(gradients, parameters, (objective.n_targets,)))

    objective.each(objective.jobs(1), run, sums=[total])
    if objective.windows and not reached and objective.context.processes.size == 1:
        raise MethodError(NO_WEIGHTS)
    return total
