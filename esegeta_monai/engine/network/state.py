"""The state of a network: frozen weights, numerical modes, a hash of the weights."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.memory_format import MemoryFormat, as_format, convolution_weights
from esegeta_monai.utils.upstream import backward_hooks, compiled_original, own_buffers

__all__ = ["frozen", "own_modes", "unwrap", "weights_hash"]


T = TypeVar("T")


def unwrap(network: nn.Module) -> nn.Module:
    """Return the plain network inside (Distributed)DataParallel and ``torch.compile``.

    The hooks of DistributedDataParallel deadlock when processes have unequal numbers of windows; a compiled network
    hides its layers and operations.
    """
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif (original := compiled_original(network)) is not None:
            network = original
        else:
            return network


def weights_hash(network: nn.Module) -> str:
    """Return the SHA-256 of names, shapes, dtypes and bytes of the state dict, whichever file it was loaded from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Put a network into evaluation mode, without parameter gradients and backward hooks, while the block runs.

    Backward hooks belong to the training and may change gradients. Flags, hooks, gradients and buffers are restored
    afterwards, also after an exception.
    """
    modes = [(m, m.training) for m in network.modules()]
    flags: list[tuple[Tensor, bool]] = [(p, p.requires_grad) for p in network.parameters()]
    gradients: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in network.parameters()]
    buffers = [
        (module, name, buffer, buffer.requires_grad)
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    values = {id(b): b.detach().clone() for _, _, b, _ in buffers}
    memory = [(t, t.data) for t in [*network.parameters(), *(b for _, _, b, _ in buffers)]]
    hooks = backward_hooks(network)
    try:
        network.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        for module, attribute, _ in hooks:
            setattr(module, attribute, OrderedDict())
        yield network
    finally:
        for tensor, data in memory:  # of another member of an ensemble
            if tensor.data_ptr() != data.data_ptr():
                tensor.data = data
        for module, attribute, own in hooks:
            setattr(module, attribute, own)
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, name, buffer, flag in buffers:
            if getattr(module, name, None) is not buffer and not isinstance(module, torch.jit.ScriptModule):
                own_buffers(module)[name] = buffer
            if not torch.equal(buffer, values[id(buffer)]):
                with torch.no_grad():
                    buffer.copy_(values[id(buffer)])
            buffer.requires_grad_(flag)
        for p, gradient in gradients:
            p.grad = gradient


@contextmanager
def evaluating(
    network: nn.Module, device: torch.device | str, memory_format: MemoryFormat = "contiguous"
) -> Iterator[None]:
    """Freeze a network (`frozen`) and set torch's modes (`own_modes`) while the block runs.

    Args:
        network: the network.
        device: of the window passes.
        memory_format: that of the windows. With ``"channels_last"`` the block works on copies of the weights of
            convolutions in this format, which saves a copy in each pass.
    """
    with own_modes(device), frozen(network):
        if memory_format != "contiguous":
            for weight in convolution_weights(network):
                weight.data = as_format(weight.data, memory_format)
        yield


@contextmanager
def own_modes(device: torch.device | str) -> Iterator[None]:
    """Set torch's modes for a network pass, whatever the caller has set.

    Gradients are on, autocast is off (`Model` switches it on), and float32 has full precision.
    """
    no_autocast = torch.autocast(torch.device(device).type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), no_autocast, _float32():
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """Compute convolutions and matrix products in IEEE float32; restore the settings afterwards.

    On GPUs torch lets convolutions round to TensorFloat-32, which has ten bits of mantissa like float16. This is enough
    for a prediction, but not as the reference for half precision. torch 2.9 has settings per operation beside the older
    ones, and reading an older one raises an error if they disagree.
    """
    backends: Any = torch.backends
    allowed = _readable(lambda: backends.cudnn.allow_tf32)
    matmul = _readable(torch.get_float32_matmul_precision)
    operations = [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul] if _BY_OPERATION else []
    before = [(operation, operation.fp32_precision) for operation in operations]
    try:
        if allowed is not None:
            backends.cudnn.allow_tf32 = False
        if matmul is not None:
            torch.set_float32_matmul_precision("highest")
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        if allowed is not None:
            backends.cudnn.allow_tf32 = allowed
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        for operation, precision in before:
            operation.fp32_precision = precision


_BY_OPERATION = hasattr(torch.backends.cudnn, "conv")


def _readable(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except RuntimeError:  # the setting was made per operation
        return None
