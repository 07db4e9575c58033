"""How a network is called, and how it is left exactly as it came."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.errors import EsegetaError, NetworkError

__all__ = [
    "Model",
]
__all__ += [
    "select_output",
]


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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch means that memory ran out, on an accelerator or on the CPU."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "can't allocate memory" in text


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

    def without_autocast(self) -> Model:
        """Return the same network without autocast."""
        other = copy.copy(self)
        other.amp = False
        return other

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
