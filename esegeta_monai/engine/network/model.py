"""The network as the engine calls it, and the choice of one of its outputs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esegeta_monai.engine.network.memory_format import MemoryFormat, as_format
from esegeta_monai.engine.network.outputs import OutputChoice, batch_first, choose_output, select_output
from esegeta_monai.errors import EsegetaError, MethodError, NetworkError
from esegeta_monai.utils.files import same_folder
from esegeta_monai.utils.tensors import copied
from esegeta_monai.utils.upstream import non_reentrant_checkpoints

__all__ = [
    "Model",
]
__all__ += [
    "select_output",
]


def check_network(network: nn.Module) -> None:
    """Check that a network can be explained.

    Raises:
        NetworkError: it has half-precision weights, or weights that are not initialised; the message names the
            alternative.
    """
    lazy = [name for name, p in chain(network.named_parameters(), network.named_buffers()) if is_lazy(p)]
    if lazy:
        raise NetworkError(
            f"weights are not initialised ({', '.join(lazy[:3])}): run the network once on an image of its size, and "
            "load its weights"
        )
    half = {p.dtype for p in network.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if half:
        raise NetworkError(
            f"the weights are {', '.join(map(str, half))}: gradients would underflow; call network.float() and use "
            "amp=True for speed"
        )


def is_scripted(network: nn.Module) -> bool:
    """Return True if a network contains TorchScript (or a runtime engine): only black-box methods can run on it."""
    return any(isinstance(m, torch.jit.ScriptModule) for m in network.modules())


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that memory ran out, on an accelerator or on the CPU."""
    text = str(error).lower()
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "not enough memory" in text or "can't allocate memory" in text


def halved(tried: int, roi: Sequence[int], error: BaseException) -> int:
    """Return the window batch to try after memory ran out: half of it.

    Args:
        tried: windows in the batch that did not fit.
        roi: size of a window in voxels.
        error: the error.

    Raises:
        MethodError: the batch had only one window; the message names what needs less memory.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if tried > 1:
        return tried // 2
    raise MethodError(
        f"out of memory with one window of {tuple(roi)}: use a smaller window (the inferer's roi_size; on the command "
        "line --override inferer#roi_size=[...]), amp=True (--amp), or device='cpu' (--device cpu)"
    ) from error


class Model:
    """The network as the objective calls it: it maps windows to one output tensor in float32 (or float64).

    Args:
        network: network in evaluation mode; see `frozen`.
        device: device of the window passes.
        output: key of one of several outputs, see `select_output`.
        amp: True: run under autocast with ``amp_kwargs`` (default float16 on CUDA, bfloat16 elsewhere).
        inputs: names and channel counts of several image inputs. The channels of a window are split among them; the
            first input is passed by position, the others by name.
        args, kwargs: further inputs, passed unchanged with every window batch.
        inferer: an inferer with unknown windows, called on the whole volume in place of the network.
        members: the weights of the members of an ensemble that share one architecture, see `load`; empty: one network.
        repeats: True: repeat a further input of batch length 1 for each image of a batch, as a network that sees whole
            images expects. Under a sliding window it is passed unchanged, as in MONAI.
        copies_input: give the network copies of each window and of further inputs, as it may write into them.
        inputs_as: ``"dict"`` or ``"list"``: pass the image inputs together as the network's first argument.
        layer_axes: axes of layers where they cannot be found out, see
            `esegeta_monai.engine.network.declared_axes.DeclaredAxes`.

    Attributes:
        preferred: keys of outputs that a bundle's postprocessing reads.
        disturbs: settings of torch that the network has changed in a pass, in words; copies of the model share them.
        mixes_rows: the images of a batch influence each other, as the checks have shown.
        memory_format: of the windows, see `esegeta_monai.engine.network.memory_format`.
        choice: the chosen output, if the network returns several tensors and ``output`` names none; known after the
            first pass.
        integers: the dtype of an output of integers; None: it is real, or not known yet.
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
        repeats: bool = False,
        copies_input: bool = False,
        members: Sequence[Mapping[str, Tensor]] = (),
        inputs_as: str | None = None,
        layer_axes: Mapping[str, str] | None = None,
    ) -> None:
        self.layer_axes = dict(layer_axes or {})
        self.inferer, self.repeats, self.copies_input = inferer, repeats, copies_input
        self.members = tuple(members)
        self.network, self.device, self.output = network, device, output
        self._outside_inference = self.mixes_rows = False
        self.preferred: Sequence[str] = ()
        self.disturbs: set[str] = set()
        self.choice: OutputChoice | None = None
        self.integers: torch.dtype | None = None
        self.memory_format: MemoryFormat = "contiguous"
        self.amp, self.amp_kwargs = amp, dict(amp_kwargs or {})
        self.inputs, self.inputs_as = dict(inputs or {}), inputs_as
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

    def load(self, member: int) -> None:
        """Give the network the weights of a member of the ensemble; nothing is copied.

        The graph of a pass holds the weights that it used, so a backward pass must come before the next member's pass.
        """
        if not self.members:
            return
        weights = self.members[member]
        for name, value in itertools.chain(self.network.named_parameters(), self.network.named_buffers()):
            if value.data_ptr() != weights[name].data_ptr():
                value.data = weights[name]

    def in_float64(self) -> Model:
        """Return a model of a copy of the network in float64, without autocast; further inputs are float64 too."""
        other = self.without_autocast()
        other.network, other.dtype = copy.deepcopy(self.network).double(), torch.float64
        other.memory_format = "contiguous"
        other.members = tuple({name: _double(value) for name, value in member.items()} for member in self.members)
        other.args = tuple(_double(value) for value in self.args)
        other.kwargs = {name: _double(value) for name, value in self.kwargs.items()}
        return other

    def autocast(self) -> Any:
        """Return the autocast context of the forward pass.

        The cache of autocast is off: it keeps a copy of every leaf that requires a gradient until the outermost
        autocast ends. Here these leaves are the windows of all passes, because the weights are frozen.
        """
        if self.autocast_dtype is None:
            return nullcontext()
        settings = {"dtype": self.autocast_dtype, "cache_enabled": False, **self.amp_kwargs}
        return torch.autocast(self.device.type, **settings)

    def __call__(
        self, x: Tensor, *, slice_axis: int | None = None, coordinates: Any = None, condition: Tensor | None = None
    ) -> Tensor:
        """Run the network on windows (n, C, *roi).

        Args:
            x: windows, float32 or float64.
            slice_axis: spatial axis of length 1 to remove for a 2D network and to restore in the output.
            coordinates: second positional argument of the network, or None.
            condition: keyword argument ``condition`` (n, …) of the network, or None.

        Returns:
            (n, K, *out_roi).

        Raises:
            NetworkError: the network raises an error on this input, or its output is complex.
        """
        more: dict[str, Any] = {"slice_axis": slice_axis, "coordinates": coordinates, "condition": condition}
        if self._outside_inference and torch.is_inference_mode_enabled():
            more["condition"] = copied(condition)
            with torch.inference_mode(False), torch.no_grad():
                return self(x.clone(), **more)
        axis = None if slice_axis is None else slice_axis + 2
        whole, x = x, x if axis is None else x.squeeze(axis)
        given, named = self.args, self.kwargs
        if self.copies_input:  # the network may write into what it gets
            x, given, named = x.clone(), copied(given), copied(named)
        x = as_format(x, self.memory_format)
        parts = list(x.split(list(self.inputs.values()), dim=1)) if self.inputs else [x]
        if self.repeats:
            given = tuple(_repeated(v, len(x)) for v in given)
            named = {k: _repeated(v, len(x)) for k, v in named.items()}
        first: Any = parts[0]
        if self.inputs_as is not None:
            first = parts if self.inputs_as == "list" else dict(zip(self.inputs, parts))
            parts = parts[:1]
        kwargs = {**named, **dict(zip(list(self.inputs)[1:], parts[1:]))}
        if condition is not None:
            kwargs["condition"] = condition if axis is None else condition.squeeze(axis)
        args = given if coordinates is None else (coordinates, *given)
        try:
            with self.autocast(), non_reentrant_checkpoints(), _contained(self.disturbs):
                if self.inferer is None:
                    raw = self.network(first, *args, **kwargs)
                else:
                    raw = self.inferer(first, self.network, *args, **kwargs)
        except TypeError as error:
            if not self.inputs or self.inputs_as is not None:
                raise
            raise NetworkError(
                f"the network does not take the image inputs {', '.join(map(repr, self.inputs))} (the first by "
                f"position, others by name): {error}; name them as its arguments are named, or give inputs_as='dict' "
                "or 'list' if it takes them as one argument"
            ) from error
        except MemoryError as error:  # torch's own error, on which callers halve the batch
            raise torch.OutOfMemoryError(f"not enough memory: {error or 'MemoryError'}") from error
        except RuntimeError as error:
            if isinstance(error, EsegetaError) or out_of_memory(error):
                raise
            if torch.is_inference_mode_enabled():  # a network that uses gradients in its forward pass fails there only
                self._outside_inference = True
                return self(whole, **more)
            raise NetworkError(
                f"the network fails on input of shape {tuple(x.shape)}: {' '.join(str(error).split())}; give it the "
                "channels and the size that it is made for (roi_size of a SlidingWindowInferer)"
            ) from error
        if self.output is None and not isinstance(raw, Tensor):
            self.choice = choose_output(raw, self.preferred)
            self.output = self.choice.key
        out = batch_first(select_output(raw, self.output, x.ndim), len(x))
        if out.is_complex():
            raise NetworkError(
                f"the network's output is complex ({out.dtype}), and targets are real: explain a network that returns "
                "its magnitude, or real and imaginary part as channels"
            )
        if not out.is_floating_point():
            self.integers = out.dtype
        if out.dtype in (torch.float16, torch.bfloat16):
            out = out.float()
        return out if axis is None else out.unsqueeze(axis)


@contextmanager
def _contained(changed: set[str]) -> Iterator[None]:
    """Restore torch's default dtype, grad mode and seed and the working folder, which a network may set in its pass;
    add what it changed.

    A network that draws random numbers, without setting the seed, goes on with the next ones.
    """
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    seed, random = torch.initial_seed(), torch.get_rng_state()
    try:
        with same_folder() as moved:
            yield
    finally:
        if moved:
            changed.add("the working folder")
        if torch.initial_seed() != seed:
            changed.add(f"the seed of torch's random numbers (to {torch.initial_seed()})")
            torch.set_rng_state(random)
        if torch.get_default_dtype() != dtype:
            changed.add(f"torch's default dtype (to {torch.get_default_dtype()})")
            torch.set_default_dtype(dtype)
        if torch.is_grad_enabled() != grad:
            changed.add(f"torch's grad mode ({'off' if grad else 'on'})")
            torch.set_grad_enabled(grad)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _repeated(value: Any, n: int) -> Any:
    """Expand a tensor of batch length 1 to batch length n; return any other value unchanged."""
    repeats = isinstance(value, Tensor) and value.ndim and len(value) == 1
    return value.expand(n, *value.shape[1:]) if repeats else value
