"""How a network is called, and how it is left exactly as it came."""

from __future__ import annotations

import difflib
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esegeta_monai.errors import EsegetaError, NetworkError, UsageError

__all__ = ["Captured", "Model", "capture", "find_layer", "frozen", "own_modes", "replaced"]
__all__ += ["select_output", "unwrap", "weights_hash"]

T = TypeVar("T")


def unwrap(network: nn.Module) -> nn.Module:
    """The plain network inside (Distributed)DataParallel, whose hooks would dead-lock where ranks have unequal
    windows, and inside ``torch.compile``, which would hide layers and operations."""
    while True:
        if isinstance(network, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            network = network.module
        elif isinstance(getattr(network, "_orig_mod", None), nn.Module):
            network = network._orig_mod  # type: ignore[assignment]
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
    buffers = [(m, n, b, b.requires_grad) for m in network.modules() for n, b in m._buffers.items() if b is not None]
    values = {id(b): b.detach().clone() for _, _, b, _ in buffers}
    hooks = [(m, name, getattr(m, name)) for m in network.modules() for name in _BACKWARD_HOOKS]
    try:
        network.eval()
        for p, _ in flags:
            p.requires_grad_(False)
        for module, name, _ in hooks:
            setattr(module, name, OrderedDict())
        yield network
    finally:
        for module, name, found in hooks:
            setattr(module, name, found)
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, name, buffer, flag in buffers:
            if not isinstance(module, torch.jit.ScriptModule):  # its dictionary cannot be written to, nor be changed
                module._buffers[name] = buffer
            if not torch.equal(buffer, values[id(buffer)]):
                with torch.no_grad():
                    buffer.copy_(values[id(buffer)])
            buffer.requires_grad_(flag)
        for p, gradient in gradients:
            p.grad = gradient


_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


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


def check_network(network: nn.Module) -> None:
    """Refuses what cannot be explained: half-precision weights.

    Raises:
        NetworkError: naming the way out.
    """
    half = {p.dtype for p in network.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if half:
        raise NetworkError(
            f"the weights are {', '.join(map(str, half))}: gradients would underflow; call network.float() and use "
            "amp=True for speed"
        )


def is_scripted(network: nn.Module) -> bool:
    """Whether a network is TorchScript (or a runtime engine), so that only black-box methods can run on it."""
    return any(isinstance(m, torch.jit.ScriptModule) for m in network.modules())


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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch means that memory ran out, on an accelerator or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "can't allocate memory" in text


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


def select_output(output: Any, key: int | str | None = None) -> Tensor:
    """The tensor to explain out of whatever a network returns.

    Without ``key``: a tensor as it is; of a tuple or list the first tensor; of a dict the only tensor, or ``"pred"``,
    ``"logits"`` or ``"out"``.

    Raises:
        NetworkError: there is no such tensor; what there is, is listed.
    """
    if isinstance(output, Tensor):
        if key not in (None, 0):
            raise NetworkError(f"output={key!r}, but the network returns a single tensor: leave output away")
        return _plain(output)
    if isinstance(output, Mapping):
        tensors = {k: v for k, v in output.items() if isinstance(v, Tensor)}
        if key is None:
            known = [k for k in ("pred", "logits", "out") if k in tensors]
            key = next(iter(tensors)) if len(tensors) == 1 else (known[0] if known else None)
        if key not in tensors:
            raise NetworkError(
                f"the network returns a dict with tensors {sorted(map(str, tensors))}: choose one with output=KEY"
            )
        return _plain(tensors[key])
    if isinstance(output, (tuple, list)):
        index = 0 if key is None else key
        if not isinstance(index, int) or not -len(output) <= index < len(output):
            raise NetworkError(f"the network returns {len(output)} outputs: output={key!r} is none of them")
        return select_output(output[index])
    raise NetworkError(
        f"the network returns {type(output).__name__}: only a tensor, or a tuple, list or dict of tensors, can be "
        "explained"
    )


def _plain(output: Tensor) -> Tensor:
    """A tensor without subclass; one that has none stays the same object, since ``as_subclass`` hides it from modes."""
    return output if type(output) is Tensor else output.as_subclass(Tensor)


class Model:
    """The network as the objective calls it: windows in, one output tensor in float32 (or float64) out.

    Args:
        network: in evaluation mode; see `frozen`.
        device: where windows are computed.
        output: which of several outputs, see `select_output`.
        amp: autocast with ``amp_kwargs`` (default float16 on CUDA, bfloat16 elsewhere).
        inputs: names and channel counts of several image inputs: the channels of a window are split and passed, the
            first positionally, the others by name.
        args, kwargs: further inputs, passed through unchanged with every window batch.
        inferer: an inferer whose windows are not known, called on the whole volume in place of the network.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        *,
        output: int | str | None = None,
        amp: bool = False,
        amp_kwargs: Mapping[str, Any] | None = None,
        inputs: Mapping[str, int] | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        inferer: Callable[..., Any] | None = None,
    ) -> None:
        self.inferer = inferer
        self.network, self.device, self.output = network, device, output
        self.amp, self.amp_kwargs = amp, dict(amp_kwargs or {})
        self.inputs = dict(inputs or {})
        self.args = tuple(args)
        self.kwargs = dict(kwargs or {})
        parameter = next((p for p in network.parameters() if p.is_floating_point()), None)
        self.dtype = parameter.dtype if parameter is not None else torch.float32

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast, or None."""
        if not self.amp:
            return None
        return self.amp_kwargs.get("dtype", torch.float16 if self.device.type == "cuda" else torch.bfloat16)

    def autocast(self) -> Any:
        """The context in which the forward pass runs.

        Without autocast's cache, which keeps a copy of every leaf that requires a gradient until the outermost autocast
        ends: here not the weights, which are frozen, but the windows of all passes.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        settings = {"dtype": self.autocast_dtype, "cache_enabled": False, **self.amp_kwargs}
        return torch.autocast(self.device.type, **settings)

    def __call__(
        self, x: Tensor, *, slice_axis: int | None = None, coordinates: Any = None, condition: Tensor | None = None
    ) -> Tensor:
        """(n, C, *roi) to (n, K, *out_roi)."""
        axis = None if slice_axis is None else slice_axis + 2
        x = x if axis is None else x.squeeze(axis)
        parts = list(x.split(list(self.inputs.values()), dim=1)) if self.inputs else [x]
        kwargs = {**self.kwargs, **dict(zip(list(self.inputs)[1:], parts[1:]))}
        if condition is not None:
            kwargs["condition"] = condition if axis is None else condition.squeeze(axis)
        args = self.args if coordinates is None else (coordinates, *self.args)
        try:
            with self.autocast():
                if self.inferer is None:
                    raw = self.network(parts[0], *args, **kwargs)
                else:
                    raw = self.inferer(parts[0], self.network, *args, **kwargs)
        except RuntimeError as error:
            if isinstance(error, EsegetaError) or out_of_memory(error):
                raise
            raise NetworkError(
                f"the network fails on input of shape {tuple(x.shape)}: {' '.join(str(error).split())}; give it the "
                "channels and the size that it is made for (roi_size of a SlidingWindowInferer)"
            ) from error
        out = select_output(raw, self.output)
        if out.dtype in (torch.float16, torch.bfloat16):
            out = out.float()
        return out if axis is None else out.unsqueeze(axis)
