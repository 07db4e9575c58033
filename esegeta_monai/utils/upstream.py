"""Access to names that MONAI, ignite and torch keep private, gathered here because any release may rename them.

`tests/utils/test_upstream.py` calls each function and names the installed version when one of these names is gone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import monai.inferers.utils
import torch
import torch.utils.checkpoint
from monai.inferers import SlidingWindowSplitter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "TorchDispatchMode",
    "active_transform",
    "attached_handlers",
    "backward_hooks",
    "compiled_original",
    "is_view",
    "non_reentrant_checkpoints",
    "operation_schema",
    "own_buffers",
    "postprocessing_of",
    "scan_interval",
    "splitter_padding",
    "splitter_parameters",
    "transformed_value",
    "view_base",
    "without_checkpoints",
    "write_count",
]


# -- torch ----------------------------------------------------------------------------------------------------------


def write_count(tensor: Tensor) -> int:
    """Return how often the memory of a tensor, of any shape, has been written to in place (``_version``).

    Raises:
        RuntimeError: the tensor was made in inference mode, which does not count.
    """
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Return True if autograd knows the tensor, of any shape, as a view of another one (``_is_view``)."""
    return tensor._is_view()


def view_base(tensor: Tensor) -> Tensor | None:
    """Return the tensor, of any shape, whose memory a view shares (``_base``), or None for a tensor that is no view."""
    return tensor._base


def operation_schema(operation: Any) -> tuple[str, list[str], bool]:
    """Return the name of an operation of torch, the names of its arguments, and whether it writes to one (``_schema``).

    >>> import torch
    >>> operation_schema(torch.ops.aten.flip.default)
    ('aten::flip', ['self', 'dims'], False)
    """
    schema = operation._schema
    return schema.name, [a.name for a in schema.arguments], schema.is_mutable


def compiled_original(module: nn.Module) -> nn.Module | None:
    """Return the module inside the result of ``torch.compile`` (``_orig_mod``), or None for any other module."""
    original = getattr(module, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else None


def own_buffers(module: nn.Module) -> MutableMapping[str, Tensor | None]:
    """Return the mapping in which a module stores its own buffers, of any shape (``_buffers``).

    Writing to it restores a buffer even where the module has deleted or overwritten the attribute.
    """
    return module._buffers


def active_transform() -> str | None:
    """Return the name of the innermost transform of ``torch.func`` that runs now, as ``vmap``; None: there is none.

    >>> active_transform()
    >>> torch.func.vmap(lambda x: print(active_transform()) or x)(torch.zeros(1))
    vmap
    tensor([0.])
    """
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return None if interpreter is None else str(interpreter.key()).rpartition(".")[2].lower()


def transformed_value(tensor: Tensor) -> Tensor:
    """Return the tensor that transforms of ``torch.func`` wrap, of any shape; a plain tensor as it is."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


class _NonReentrant:
    """Takes the place of torch's reentrant checkpoint function; the other kind computes the same values."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


class _Plain:
    """Takes the place of torch's reentrant checkpoint function, and stores all activations."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


_CHECKPOINT_FUNCTION = torch.utils.checkpoint.CheckpointFunction


@contextmanager
def non_reentrant_checkpoints() -> Iterator[None]:
    """Let reentrant checkpoints run as non-reentrant ones while the block runs, unless `without_checkpoints` is active.

    Only these support ``torch.autograd.grad`` and gradients of inputs that enter in another way than as arguments. The
    function that ``checkpoint`` calls is exchanged, so names imported earlier are included.
    """
    if torch.utils.checkpoint.CheckpointFunction is not _CHECKPOINT_FUNCTION:
        yield
        return
    with mock.patch.object(torch.utils.checkpoint, "CheckpointFunction", _NonReentrant):
        yield


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Switch activation checkpointing off while the block runs (``_checkpoint_without_reentrant_generator``)."""

    def once(*_: Any, **__: Any) -> Iterator[None]:
        yield

    module = torch.utils.checkpoint
    with (
        mock.patch.object(module, "CheckpointFunction", _Plain),
        mock.patch.object(module, "_checkpoint_without_reentrant_generator", once),
    ):
        yield


def backward_hooks(network: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """List the backward hooks of a network's modules: module, name of the attribute, and the hooks it holds."""
    return [
        (module, name, hooks)
        for module in network.modules()
        for name in ("_backward_hooks", "_backward_pre_hooks")
        if (hooks := getattr(module, name))
    ]


# -- MONAI ----------------------------------------------------------------------------------------------------------


def scan_interval(shape: Sequence[int], roi: Sequence[int], overlap: Sequence[float]) -> tuple[int, ...]:
    """Return the distance in voxels between neighbouring windows of ``sliding_window_inference``, per axis.

    Args:
        shape: spatial shape of the padded volume.
        roi: shape of a window.
        overlap: share of a window that its neighbour covers, per axis.
    """
    return monai.inferers.utils._get_scan_interval(shape, roi, len(shape), overlap)


def splitter_parameters(splitter: SlidingWindowSplitter, shape: Sequence[int]) -> tuple[Any, Any, Any]:
    """Return (patch size, overlap, offset) of a splitter for a volume, one entry per spatial axis of ``shape``."""
    return splitter._get_valid_shape_parameters(shape)


def splitter_padding(
    splitter: SlidingWindowSplitter,
    shape: Sequence[int],
    patch: Sequence[int],
    offset: Sequence[int],
    overlap: Sequence[float],
) -> list[tuple[int, int]]:
    """Return the voxels that a splitter adds to a volume: (before, after) per spatial axis.

    Args:
        splitter: the splitter.
        shape: spatial shape of the volume.
        patch: shape of a patch, without zeros.
        offset, overlap: from `splitter_parameters`.
    """
    sizes, _ = splitter._calculate_pad_size(shape, len(shape), patch, offset, overlap)
    return list(zip(sizes[1::2], sizes[::2]))


# -- ignite and MONAI's engines -------------------------------------------------------------------------------------


def attached_handlers(engine: Any, event: Any) -> list[Callable[..., Any]]:
    """Return the functions attached to an event of an ignite engine, in the order in which they run."""
    return [function for function, _, _ in engine._event_handlers.get(event, [])]


def postprocessing_of(handler: Callable[..., Any]) -> Any:
    """Return the postprocessing transform of a MONAI engine from the function that applies it, or None for others.

    MONAI keeps the transform nowhere but in the closure variable ``posttrans`` of the handler that it attaches to
    ``IterationEvents.MODEL_COMPLETED``.
    """
    return inspect.getclosurevars(handler).nonlocals.get("posttrans") if inspect.isfunction(handler) else None
