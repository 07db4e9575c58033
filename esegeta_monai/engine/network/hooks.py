"""Hooks that read or replace the output of a layer."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esegeta_monai.engine.network.model import is_scripted
from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.utils.upstream import active_transform, write_count

__all__ = ["INPUT", "Captured", "LayerCall", "capture", "find_layer", "on_output", "replaced"]

INPUT = ":input"
"""Ending of a layer's name that stands for the layer's first input in place of its output."""


def find_layer(network: nn.Module, name: str) -> nn.Module:
    """Return the module at a dotted name; with the ending `INPUT`, the module whose input is meant.

    Raises:
        UsageError: no such layer (the message lists near matches), or an empty name.
        NetworkError: the network is TorchScript.
    """
    name = name.removesuffix(INPUT)
    module, within = network, [network]
    try:
        for part in name.split("."):
            if isinstance(module, torch.jit.ScriptModule):  # raises another error than nn.Module
                break
            module = module.get_submodule(part)
            within.append(module)
    except AttributeError:
        if not is_scripted(network):
            names = [n for n, _ in network.named_modules() if n]
            if not names:
                raise UsageError(
                    f"the network has no layer {name!r}: it is one {type(network).__name__} without layers inside; "
                    "omit the layer, or wrap the network in a module"
                ) from None
            near = difflib.get_close_matches(name, names, n=5, cutoff=0.3)
            near += [n for n in names if n not in near and n.rpartition(".")[2] == name.rpartition(".")[2]][:3]
            shown = f"near matches: {', '.join(near)}" if near else f"it has {', '.join(names[:5])}"
            raise UsageError(
                f"the network has no layer {name!r}; {shown} ('esegeta-monai layers' lists all of a bundle, "
                "network.named_modules() those of any network)"
            ) from None
        within = list(network.modules())
    if any(isinstance(m, torch.jit.ScriptModule) for m in within):
        raise NetworkError("a TorchScript network does not show its layers: load the plain PyTorch network")
    if not name:
        raise UsageError("layer='': give the dotted name of a layer ('esegeta-monai layers' lists them), or omit it")
    return module


class Captured(dict[str, Tensor]):
    """Outputs of layers by name.

    Attributes:
        each: the outputs of all calls of each layer, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.each: dict[str, list[Tensor]] = {}

    def __getitem__(self, layer: str) -> Tensor:
        """Return the output of a layer that ran once.

        Raises:
            NetworkError: it did not run as a module, or several times.
        """
        if layer not in self.each:
            raise NetworkError(
                f"layer {layer!r} does not run as a module in the forward pass (its weights are used directly, or not "
                "at all): choose another layer"
            )
        if len(self.each[layer]) > 1:
            raise NetworkError(
                f"layer {layer!r} runs {len(self.each[layer])} times in a pass: choose a layer that runs once "
                "('esegeta-monai layers' lists them)"
            )
        return self.each[layer][0]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, as its output hook sees it.

    Attributes:
        name: dotted name of the layer.
        module: the layer.
        args: its positional arguments.
        output: what it returned.
        counts: the `write_count` of each argument before the call.
    """

    name: str
    module: nn.Module
    args: Sequence[Any]
    output: Any
    counts: Sequence[int]

    def returns_argument(self, value: Tensor) -> bool:
        """Return True if ``value``, of any shape, is one of the arguments and has not been written to in place."""
        return any(value is a and now == then for a, now, then in zip(self.args, _counts(self.args), self.counts))


def _counts(args: Sequence[Any]) -> list[int]:
    return [write_count(a) if isinstance(a, Tensor) and not a.is_inference() else 0 for a in args]


@contextmanager
def on_output(layers: Mapping[str, nn.Module], hook: Callable[[LayerCall], Any]) -> Iterator[None]:
    """Call ``hook`` after each call of the layers while the block runs; a result except None replaces the output.

    For a name with the ending `INPUT`, the hook is called before the layer, with its first positional input as the
    output; a result replaces that input.
    """
    counts: dict[str, list[int]] = {}

    def at_input(name: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
        first = args[0] if args else None
        result = hook(LayerCall(name, module, args[:1], first, _counts(args[:1])))
        return None if result is None else (result, *args[1:])

    def register(name: str, module: nn.Module) -> list[RemovableHandle]:
        if name.endswith(INPUT):
            return [module.register_forward_pre_hook(lambda m, args: at_input(name, m, args))]
        return [
            module.register_forward_pre_hook(lambda m, args: counts.update({name: _counts(args)})),
            module.register_forward_hook(lambda m, args, output: hook(LayerCall(name, m, args, output, counts[name]))),
        ]

    handles: list[RemovableHandle] = []
    try:
        for name, module in layers.items():
            handles += register(name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_tensor_or_none(output: Any) -> Tensor | None:
    """Return a layer's output, of any shape, or the first of several outputs; None: it is no tensor."""
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    return value if isinstance(value, Tensor) else None


def unreadable(layer: str, transform: str) -> str:
    """Return the reason why a layer cannot be read that runs inside a transform of ``torch.func``."""
    return (
        f"layer {layer!r} runs inside torch.func.{transform}, where its output cannot be read: choose a layer "
        "outside it, or a gradient or perturbation method that reads no layer"
    )


def first_tensor(layer: str, output: Any) -> Tensor:
    """Return a layer's output, of any shape, or the first of several outputs.

    Raises:
        NetworkError: it is no tensor, or one of a transform of ``torch.func``, whose axes are not those of a window.
    """
    transform = active_transform()
    if transform is not None:
        raise NetworkError(unreadable(layer, transform))
    value = first_tensor_or_none(output)
    if value is None and layer.endswith(INPUT) and output is None:
        raise NetworkError(f"layer {layer!r} takes no input by position: choose the output of the layer before it")
    if value is None:
        raise NetworkError(f"layer {layer!r} gives {type(value).__name__}, not a tensor: choose one inside it")
    return value


def with_first(output: Any, value: Tensor) -> Any:
    """Return a layer's output with ``value``, of any shape, in place of its `first_tensor`."""
    if not isinstance(output, (tuple, list)):
        return value
    items = [value, *output[1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def check_rows(layer: str, value: Tensor, windows: int) -> None:
    """Check that a layer's output (n, …) has one row per window.

    Raises:
        NetworkError: it has another length.
    """
    if value.ndim == 0 or len(value) != windows:
        raise NetworkError(
            f"layer {layer!r} gives {tuple(value.shape)} for {windows} window(s), so its first axis is not the windows "
            "(slices or parts of a window in the batch, tokens before the batch): choose a layer with one row for each "
            "window, or GradCam, HiResCam or LayerActivation, which put the parts together where they can be traced"
        )


@contextmanager
def _count_windows(network: nn.Module) -> Iterator[list[int]]:
    """Record the number of windows of the network's latest call, in a list with one entry."""
    number = [0]

    def note(module: nn.Module, args: Any) -> None:
        number[0] = len(args[0])

    handle = network.register_forward_pre_hook(note)
    try:
        yield number
    finally:
        handle.remove()


@contextmanager
def capture(
    network: nn.Module, layers: Sequence[str], *, of_windows: bool = True, leaves: bool = False
) -> Iterator[Captured]:
    """Record the outputs of layers by hooks while the block runs.

    The network continues with a copy, so that a later in-place operation cannot change the recorded output. If a layer
    returns its input unchanged, a copy is recorded: its gradient is that of the layer's output only, not of other uses
    of the input.

    Args:
        network: called in the block with the windows (n, …) as its first argument.
        layers: dotted names.
        of_windows: require one row per window from each layer.
        leaves: if the image requires no gradient, start the graph at the first of the layers. The part before it is not
            stored; allocating its memory takes longer than its gradient would.

    Raises:
        UsageError: no such layer.
        NetworkError: while the network runs: a layer's output is no tensor, or its first axis is not the windows.
    """
    captured = Captured()
    if not layers:  # TorchScript takes no hooks
        yield captured
        return

    def record(call: LayerCall) -> Any:
        value = first_tensor(call.name, call.output)
        if of_windows:
            check_rows(call.name, value, windows[0])
        if call.returns_argument(value):
            value = value.clone()
        if leaves and torch.is_grad_enabled() and value.is_floating_point() and not value.requires_grad:
            value = value.detach().requires_grad_(True)
        captured[call.name] = value
        captured.each.setdefault(call.name, []).append(value)
        return with_first(call.output, value.clone())

    with _count_windows(network) as windows, on_output({n: find_layer(network, n) for n in layers}, record):
        yield captured


@contextmanager
def replaced(network: nn.Module, layer: str, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output of a layer (n, …) by ``edit(output)`` while the block runs.

    Raises:
        UsageError: no such layer.
        NetworkError: its output is no tensor, or its first axis is not the windows.
    """

    def replace(call: LayerCall) -> Any:
        value = first_tensor(layer, call.output)
        check_rows(layer, value, windows[0])
        return with_first(call.output, edit(value))

    with _count_windows(network) as windows, on_output({layer: find_layer(network, layer)}, replace):
        yield
