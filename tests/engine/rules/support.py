"""Shared by the rule tests: a network's complete state, and outputs that do not vanish when compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def state(network: nn.Module) -> dict[str, Any]:
    """Everything that an explanation must leave as it was: weights, buffers, flags, hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {
        "values": {name: (tensor.detach().clone(), tensor._version, id(tensor)) for name, tensor in tensors.items()},
        "flags": {name: (parameter.requires_grad, parameter.grad) for name, parameter in network.named_parameters()},
        "modules": {
            name: (module.training, *(len(getattr(module, hook)) for hook in hooks), sorted(vars(module)))
            for name, module in network.named_modules()
        },
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["flags"] == after["flags"]
    assert before["modules"] == after["modules"]
    assert before["values"].keys() == after["values"].keys()
    for name, (value, version, identity) in before["values"].items():
        now, now_version, now_identity = after["values"][name]
        assert (version, identity) == (now_version, now_identity), name
        assert torch.equal(value, now), name


def gradient(forward: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (result,) = torch.autograd.grad(forward(leaf), leaf, cotangent)
    return result


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max())


def weights_matrix(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A linear operation as (matrix, bias): the columns are its answers to unit vectors."""
    zero = torch.zeros(shape, dtype=torch.float64)
    with torch.no_grad():
        bias = function(zero).flatten()
        eye = torch.eye(zero.numel(), dtype=torch.float64)
        columns = [function(unit.view(shape)).flatten() - bias for unit in eye]
    return torch.stack(columns, dim=1), bias
