"""The state of a network: frozen weights, numerical modes, a hash of the weights."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from esegeta_monai.utils.upstream import backward_hooks, compiled_original, replace_backward_hooks

__all__ = ["frozen", "own_modes", "unwrap", "weights_hash"]


T = TypeVar("T")


def unwrap(network: nn.Module) -> nn.Module:
    """The plain network inside (Distributed)DataParallel, whose hooks would dead-lock where ranks have unequal
    windows, and inside ``torch.compile``, which would hide layers and operations."""
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif (original := compiled_original(network)) is not None:
            network = original
        else:
            return network


def weights_hash(network: nn.Module) -> str:
    """sha256 over names, shapes and bytes of the state dict: the same weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def frozen(network: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without parameter gradients and without backward hooks, which see and may change gradients that
    are the training's; flags, hooks, gradients and buffers are put back afterwards, also after an exception."""
    modes = [(m, m.training) for m in network.modules()]
    flags: list[tuple[Tensor, bool]] = [(p, p.requires_grad) for p in network.parameters()]
    gradients: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in network.parameters()]
    buffers = [
        (module, name, buffer, buffer.requires_grad)
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    values = {id(b): b.detach().clone() for _, _, b, _ in buffers}
    hooks = [(module, backward_hooks(module)) for module in network.modules()]
    try:
        network.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        for module, own in hooks:
            replace_backward_hooks(module, {name: OrderedDict() for name in own})
        yield network
    finally:
        for module, own in hooks:
            replace_backward_hooks(module, own)
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, name, buffer, flag in buffers:
            if not isinstance(module, torch.jit.ScriptModule):  # its dictionary cannot be written to, nor be changed
                setattr(module, name, buffer)
            if not torch.equal(buffer, values[id(buffer)]):
                with torch.no_grad():
                    buffer.copy_(values[id(buffer)])
            buffer.requires_grad_(flag)
        for p, gradient in gradients:
            p.grad = gradient


@contextmanager
def own_modes(device: torch.device | str) -> Iterator[None]:
    """The state in which a network is asked, whatever an evaluator or a trainer has set: gradients on, autocast off
    (`Model` decides), and a float32 that is float32."""
    no_autocast = torch.autocast(torch.device(device).type, enabled=False)
    with torch.inference_mode(False), torch.enable_grad(), no_autocast, _float32():
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """Convolutions and matrix products in IEEE float32, all settings as they were afterwards.

    On GPUs torch lets convolutions round to TensorFloat-32, whose ten bits of mantissa are those of float16: enough for
    a prediction, and what autocast offers, but not what half precision is measured against. torch 2.9 has settings by
    operation beside the older ones, and an older one cannot be read where they disagree.
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
    except RuntimeError:  # torch's word that it was set by operation
        return None
