"""A simulated device other than the CPU, available on any machine, to test the placement of tensors.

Its tensors are torch's own meta tensors, so ``.device``, autograd, modules and subclasses behave as on a real device.
Their values are kept in CPU memory. Each operation below autograd runs on these values, and raises where a GPU would:
operands on two devices, an index on the device for a CPU tensor, a CPU generator for a draw on the device. Torch itself
refuses the conversion to NumPy. Results equal the CPU's, bit for bit where torch decomposes an operation the same way.

Only the placement is simulated: no kernels, autocast, memory, streams or second GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FAKE", "fake_device"]

FAKE = torch.device("meta")

_aten = torch.ops.aten
_CROSSING = {_aten.copy_, _aten._to_copy}
_INDEXED = {_aten.index, _aten._unsafe_index}
_INDEXED |= {_aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index_put}
_FILLING = {_aten.fill_, _aten.fill, _aten.masked_fill, _aten.masked_fill_}


@contextmanager
def fake_device() -> Iterator[torch.device]:
    """Make `FAKE` behave as a device with memory of its own.

    >>> with fake_device() as there:
    ...     x = torch.tensor([1.0, 2.0], device=there)
    ...     x.device.type, float(x.sum()), x.cpu()
    ('meta', 3.0, tensor([1., 2.]))
    """
    autocast = torch.autocast

    def known(device_type: str, *args: Any, **kwargs: Any) -> Any:  # torch has no autocast for meta tensors
        return autocast("cpu" if device_type == FAKE.type else device_type, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", known))
        stack.enter_context(_Numbers())
        stack.enter_context(_FakeDevice())
        yield FAKE


class _Numbers(TorchFunctionMode):
    """Python numbers become tensors here and are sent there: torch never looks at those of a meta tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Tensor):
            device, wanted = kwargs.pop("device", None), kwargs.pop("requires_grad", False)
            result = func(_mapped(lambda v: v.item() if isinstance(v, Tensor) else v, args[0]), *args[1:], **kwargs)
            return (result if device is None else result.to(device)).requires_grad_(wanted)
        if func is Tensor.new_tensor and args[0].is_meta and "device" not in kwargs:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(FAKE)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            args = (args[0], _as_tensors(args[1]), *args[2:])
        return func(*args, **kwargs)


def _as_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_as_tensors(i) for i in index)
    return torch.tensor(index) if isinstance(index, (list, np.ndarray)) else index


class _FakeDevice(TorchDispatchMode):
    """Does every operation on the values of its operands."""

    def __init__(self) -> None:
        super().__init__()
        # a weak reference keeps the address of a storage from being given to another one
        self.values: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self.limit = 1000

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _composite(func):  # inference mode asks before it takes an operation apart
            with self:
                return func.decompose(*args, **kwargs)
        operands: list[Any] = []
        _mapped(operands.append, [*args, *kwargs.values()])
        tensors = [t for t in operands if isinstance(t, Tensor)]
        any_there = any(t.is_meta for t in tensors)
        device, packet = kwargs.get("device"), func.overloadpacket
        if not any_there and not _is_there(device):
            return func(*args, **kwargs)
        _refuse(func, args, tensors)
        if any_there and (func.is_view or torch.Tag.inplace_view in func.tags):
            return func(*args, **kwargs)  # of the same values
        if packet is _aten._fused_sdp_choice:
            return 0  # attention written in other operations
        if device is not None:
            to_there = _is_there(device)
        else:
            to_there = args[0].is_meta if packet in _CROSSING | _INDEXED else True
        for one in operands:
            if to_there and isinstance(one, torch.Generator) and one.device != FAKE:
                raise RuntimeError(f"Expected a '{FAKE}' device type for generator but found '{one.device}'")
        written: dict[int, Tensor] = {}

        def here(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            local = self._here(value) if value.is_meta else value
            written[id(local)] = value
            return local

        def back(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) not in written:
                return self._there(value) if to_there else value
            original = written[id(value)]
            assert original.shape == value.shape, f"{func} changes the shape of what it writes to"
            return original

        if device is not None:
            kwargs["device"] = torch.device("cpu")
        args = _mapped(here, args)
        return _mapped(back, func(*args, **{k: _mapped(here, v) for k, v in kwargs.items()}))

    def _here(self, tensor: Tensor) -> Tensor:
        """The values of a tensor there, in their own memory."""
        known = self.values.get(tensor.untyped_storage()._cdata)
        assert known is not None, f"a tensor on {FAKE} that was made outside of fake_device() has no values"
        local = torch.empty(0, dtype=tensor.dtype)
        local.set_(known[1], tensor.storage_offset(), tensor.shape, tensor.stride())
        local = local.conj() if tensor.is_conj() else local
        return torch._neg_view(local) if tensor.is_neg() else local

    def _there(self, values: Tensor) -> Tensor:
        """A tensor there with these values."""
        if values.storage_offset() or values.is_conj() or values.is_neg():
            values = values.resolve_conj().resolve_neg().clone()
        remote = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=FAKE)
        storage = remote.untyped_storage()
        self.values[storage._cdata] = (StorageWeakRef(storage), values.untyped_storage())
        if len(self.values) > self.limit:
            self.values = {k: v for k, v in self.values.items() if not v[0].expired()}
            self.limit = 2 * len(self.values) + 1000
        return remote


@cache
def _composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _mapped(do: Callable[[Any], Any], values: Any) -> Any:
    """Operands of an operation, or its results, one by one."""
    return type(values)([_mapped(do, v) for v in values]) if type(values) in (tuple, list) else do(values)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == FAKE.type


def _refuse(func: Any, args: Any, tensors: Sequence[Tensor]) -> None:
    """Raises where a GPU would: operands on two devices, but for numbers (no axes) of the CPU in pointwise operations
    and indices of the CPU."""
    packet = func.overloadpacket
    if packet in _CROSSING:
        return
    if packet in _INDEXED:
        if not args[0].is_meta and any(i is not None and i.is_meta for i in args[1]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = [args[0], *(a for a in args[2:] if isinstance(a, Tensor))]
    if packet in _INDEXED | _FILLING or torch.Tag.pointwise in func.tags:
        written = args[0] if func._schema.is_mutable else None
        tensors = [t for t in tensors if t.is_meta or t.ndim or t is written]
    if len({t.is_meta for t in tensors}) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {FAKE} and cpu! ({func})"
        )
