"""Guided backpropagation and deconvolution by hooks on autograd's graph: no module, no function mode, no rule engine.

After a plain forward pass (here through MONAI's whole inferer) the graph has a node for every activation, however it
was called. A prehook of the node gets the gradient at its output, a hook the gradient at its input as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from monai.networks.blocks import MemoryEfficientSwish, Swish
from torch import Tensor, nn

__all__ = ["RECTIFIERS", "count_paths", "kind_of", "modified_gradient", "nodes_of", "written_out"]

RECTIFIERS = ("Relu", "LeakyRelu", "PreluKernel", "Elu", "Gelu", "Silu", "Mish", "Softplus", "Hardtanh", "Hardswish")


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


def kind_of(node: Any) -> str:
    """Return the name of the operation that created a node: ``"Relu"`` for a ReluBackward0."""
    name: str = node.name()
    return name.rstrip("0123456789").removesuffix("Backward")


def nodes_of(output: Tensor) -> list[Any]:
    """List all nodes of a tensor's graph, from the output to the leaves."""
    assert output.grad_fn is not None
    order: list[Any] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(output.grad_fn, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(child, False) for child, _ in node.next_functions if child is not None]
    return order[::-1]


def count_paths(output: Tensor, leaf: Tensor) -> dict[Any, tuple[int, int]]:
    """Count for each node the paths from the output to it, and from it to the leaf, in exact integers."""
    order = nodes_of(output)
    down = dict.fromkeys(order, 0)
    down[output.grad_fn] = 1
    for node in order:
        for child, _ in node.next_functions:
            if child is not None:
                down[child] += down[node]
    up: dict[Any, int] = {}
    for node in reversed(order):
        if getattr(node, "variable", None) is leaf:
            up[node] = 1
        else:
            up[node] = sum(up[child] for child, _ in node.next_functions if child is not None)
    return {node: (down[node], up[node]) for node in order}


def modified_gradient(network: nn.Module, value: Callable[[Tensor], Tensor], x: Tensor, rule: str) -> Tensor:
    """Compute the gradient of ``value`` at x under the rule "guided" or "deconvolution" at every rectifier."""
    x = x.detach().clone().requires_grad_(True)
    with written_out(network, _swish(rule)), torch.enable_grad():
        output = value(x)
    for node in nodes_of(output):
        if kind_of(node) in RECTIFIERS:
            node.register_prehook(lambda grads: tuple(None if g is None else g.clamp(min=0) for g in grads))
            node.register_hook(_guided if rule == "guided" else _deconvolution)
    (gradient,) = torch.autograd.grad(output, x)
    return gradient


def _guided(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].clamp(min=0), *inputs[1:])


def _deconvolution(inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (outputs[0].clamp(min=0), *inputs[1:])


def _swish(rule: str) -> Hook:
    """Return a forward hook for MONAI's Swish, which is several nodes (a product with a sigmoid)."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        start = args[0].clone()
        output = type(module).forward(module, start)
        arrived: list[Tensor] = []

        def behind(gradient: Tensor) -> Tensor:
            arrived.append(gradient.clamp(min=0))
            return arrived[-1]

        output.register_hook(behind)
        start.register_hook(lambda g: g.clamp(min=0) if rule == "guided" else arrived[-1])
        return output

    return hook


@contextmanager
def written_out(network: nn.Module, swish: Hook) -> Iterator[None]:
    """Put MONAI's Swish under a forward hook and run in-place activations out of place: in place on a view, autograd
    merges their node with another."""
    handles = []
    in_place = [m for m in network.modules() if getattr(m, "inplace", False)]
    try:
        for module in in_place:
            module.inplace = False  # type: ignore[assignment]
        for module in network.modules():
            if isinstance(module, (Swish, MemoryEfficientSwish)):
                handles.append(module.register_forward_hook(swish))
        yield
    finally:
        for module in in_place:
            module.inplace = True  # type: ignore[assignment]
        for handle in handles:
            handle.remove()
