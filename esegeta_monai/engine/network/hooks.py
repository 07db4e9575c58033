"""Hooks that read or replace the output of a layer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esegeta_monai.engine.network.model import is_scripted
from esegeta_monai.errors import NetworkError, UsageError

__all__ = ["Captured", "capture", "find_layer", "replaced"]


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """The module at a dotted name.

    Raises:
        UsageError: no such layer; near matches are listed. No name.
        NetworkError: TorchScript.
    """
    module, within = network, [network]
    try:
        for part in name.split("."):
            if isinstance(module, torch.jit.ScriptModule):  # which raises another error than a module's
                break
            module = module.get_submodule(part)
            within.append(module)
    except AttributeError:
        if not is_scripted(network):
            names = [n for n, _ in network.named_modules() if n]
            near = difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
            raise UsageError(
                f"the network has no layer {name!r}; near matches: {', '.join(near)} ('esegeta-monai layers' lists all)"
            ) from None
        within = list(network.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in within):
        raise NetworkError("a TorchScript network does not show its layers: load the plain PyTorch network")
    if not name:
        raise UsageError("layer='': give a layer's dotted name ('esegeta-monai layers' lists them), or leave it away")
    return module


class Captured(dict[str, Tensor]):
    """Outputs of layers by name, from the last forward pass; each the last call where a module is called again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}


def versions(args: Sequence[Any]) -> list[int]:
    """How often each argument of a module has been written to: what `handed_on` compares with."""
    return [a._version if isinstance(a, Tensor) and not a.is_inference() else 0 for a in args]


def note_versions(module: nn.Module, name: str, before: dict[str, list[int]]) -> RemovableHandle:
    """A hook that notes under a name, before each call of a module, the `versions` of its arguments."""
    return module.register_forward_pre_hook(lambda m, args: before.update({name: versions(args)}))


def handed_on(value: Tensor, args: Sequence[Any], before: Sequence[int]) -> bool:
    """Whether a module returned one of its arguments as it was, neither computed anew nor written to in place."""
    return any(value is a and now == then for a, now, then in zip(args, versions(args), before))


def first_tensor(layer: str, output: Any) -> Tensor:
    """A layer's output, or the first of several.

    Raises:
        NetworkError: it is no tensor.
    """
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(value, Tensor):
        raise NetworkError(f"layer {layer!r} gives {type(value).__name__}, not a tensor: choose one inside it")
    return value


def with_first(output: Any, value: Tensor) -> Any:
    """A layer's output with ``value`` in the place of `first_tensor`."""
    if not isinstance(output, (tuple, list)):
        return value
    items = [value, *output[1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def check_rows(layer: str, value: Tensor, windows: int) -> None:
    """Raises `NetworkError` where a layer's first axis is not the windows, so that no row of it is one window's map."""
    if value.ndim == 0 or len(value) != windows:
        raise NetworkError(
            f"layer {layer!r} gives {tuple(value.shape)} for {windows} window(s), so its first axis is not the windows "
            "(attention inside parts of a window, tokens before the batch): choose the block round it"
        )


class _Windows:
    """How many windows a network is called with, by a hook on it."""

    def __init__(self, network: nn.Module) -> None:
        self.number = 0
        self.handle = network.register_forward_pre_hook(self._see)

    def _see(self, module: nn.Module, args: Any) -> None:
        self.number = len(args[0])


@contextmanager
def capture(
    network: nn.Module, layers: Sequence[str], *, of_windows: bool = True, leaves: bool = False
) -> Iterator[Captured]:
    """Hooks that record the output of layers, removed afterwards.

    What flows on is a copy, so that an in-place operation behind a layer cannot change what was recorded. A layer that
    hands its input on untouched is recorded as a copy of its own: the gradient there is that of its output only.

    Args:
        network: called inside with the windows (n, …) as its first argument.
        layers: dotted names.
        of_windows: a layer must give one row a window.
        leaves: where the image asks for no gradient, the graph begins at the first of the layers: nothing in front of
            it is kept, the memory of which costs more time than its gradient would.

    Raises:
        UsageError: no such layer.
        NetworkError: while the network runs: a layer gives no tensor, or other rows than the windows.
    """
    captured = Captured()
    if not layers:
        yield captured
        return
    seen = _Windows(network)
    handles = []
    before: dict[str, list[int]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = first_tensor(name, output)
            if of_windows:
                check_rows(name, value, seen.number)
            if handed_on(value, args, before[name]):
                value = value.clone()
            if leaves and torch.is_grad_enabled() and value.is_floating_point() and not value.requires_grad:
                value = value.detach().requires_grad_(True)
            captured[name] = value
            captured.calls[name] = captured.calls.get(name, 0) + 1
            return with_first(output, value.clone())

        return hook

    try:
        for name in layers:
            module = find_layer(network, name)
            handles.append(note_versions(module, name, before))
            handles.append(module.register_forward_hook(hook_for(name)))
        yield captured
    finally:
        for handle in [seen.handle, *handles]:
            handle.remove()


@contextmanager
def replaced(network: nn.Module, layer: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The output of a layer goes on as ``edit(output)`` inside; the hook is removed afterwards.

    Raises:
        UsageError: no such layer.
        NetworkError: its output is no tensor, or has other rows than the windows.
    """
    replaced_layer = find_layer(network, layer)
    seen = _Windows(network)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        value = first_tensor(layer, output)
        check_rows(layer, value, seen.number)
        return with_first(output, edit(value))

    handle = replaced_layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
        seen.handle.remove()
