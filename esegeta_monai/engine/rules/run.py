"""One explained pass: the forward under the rules, checked against the plain one, and a backward for every target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from esegeta_monai.engine.network.hooks import LayerCall, check_rows, first_tensor, on_output, with_first
from esegeta_monai.engine.rules.mode import RuleMode, Rules
from esegeta_monai.errors import InputError, MethodError, NetworkError
from esegeta_monai.utils.upstream import compiled_original

__all__ = ["Compare", "Forward", "LayerRelevance", "Relevance", "Run", "check_network"]

Forward = Callable[[Tensor], Tensor]

Compare = bool | Forward
"""Whether the output under the rules is compared with the plain one, which takes a forward pass more; or what computes
the plain one, of all windows or of the first ones."""

#: How far the output under the rules may lie from the plain output, relative to its largest value. Some operations are
#: computed from their parts, so rounding differs.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class LayerRelevance:
    """What a method says at the output of one module.

    Attributes:
        activation: the module's output, (n, …).
        gradient: what arrives there by the method's rules, (k, n, …): a modified gradient, a multiplier, or relevance.
        relevance: the attribution of the module's output, (k, n, …).
    """

    activation: Tensor
    gradient: Tensor
    relevance: Tensor


@dataclass(frozen=True)
class Relevance:
    """Attributions of k targets for n windows.

    Attributes:
        input: attribution of the input, (k, n, C, *roi).
        booked: relevance that stayed with biases and other constants, (k, n); zero for methods that have none.
        output: the network's output, (n, K, …).
        layers: the attribution at each requested module's output.
        at_baseline: the network's output at the baseline, where there is one.
    """

    input: Tensor
    booked: Tensor
    output: Tensor
    layers: Mapping[str, LayerRelevance] = field(default_factory=dict)
    at_baseline: Tensor | None = None


def check_network(network: nn.Module) -> None:
    """Raise :class:`NetworkError` where the rules could not see inside ``network``: TorchScript, compiled, half."""
    for name, module in network.named_modules():
        what = None
        if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
            what = "a TorchScript module"
        elif compiled_original(module) is not None:
            what = "compiled by torch.compile"
        if what:
            raise NetworkError(
                f"{name or type(module).__name__} is {what}: rule-based methods need the eager network; "
                "load the original network, or use a perturbation method"
            )
    for name, parameter in network.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise NetworkError(
                f"parameter {name} is {parameter.dtype}: rule-based methods need float32 or float64; call .float()"
            )


class Run:
    """The network's forward under rules, kept with its graph, ready for one backward pass per target.

    Args:
        forward: windows (n, C, *roi) to outputs (n, K, …).
        x: the windows.
        rules: the method's rules.
        reference: a recorded pass (see :class:`RuleMode`).
        layers: modules whose outputs are asked for.
        compare: see `Compare`.

    Raises:
        MethodError: the output under the rules is not the plain one.
    """

    def __init__(
        self,
        forward: Forward,
        x: Tensor,
        rules: Rules,
        *,
        reference: list[tuple[str, tuple[Tensor, ...]]] | None = None,
        layers: Mapping[str, nn.Module] | None = None,
        compare: Compare = True,
    ) -> None:
        _check_input(forward, x)
        with torch.inference_mode(False), _eager(x):
            if compare is not False:
                with torch.no_grad():
                    plain = (forward if compare is True else compare)(_copy(x))
            self.mode = RuleMode(rules, reference=reference)
            self.leaf = _copy(x).requires_grad_()
            with torch.enable_grad(), _captured(layers or {}, len(x)) as self.captured, _no_saved_tensor_hooks():
                start = self.leaf.clone()
                with self.mode:
                    self.output = forward(self.mode.enter_input(start))
        if not self.mode.seen(self.output):
            raise NetworkError(
                "the output was computed by something that the rule engine cannot see (TorchScript, a compiled "
                "function, a custom autograd.Function); use the eager network, or a perturbation method"
            )
        if compare is not False:
            output = self.output.detach()
            _check_agreement(output if compare is True else output[: len(plain)], plain)

    def backward(self, cotangents: Tensor, *, ends: bool = False) -> Iterator[tuple[Tensor, dict[str, Tensor], Any]]:
        """For each target: what arrives at the input, at each layer, and the ledger of this pass.

        Args:
            cotangents: (k, n, K, …).
            ends: nothing is asked of the graph after the last target, whose pass may free it as it goes.
        """
        if cotangents.shape[1:] != self.output.shape:
            raise InputError(
                f"cotangents of shape {tuple(cotangents.shape)} do not fit outputs of shape "
                f"{tuple(self.output.shape)}: expected (targets, *output shape)"
            )
        places = [self.leaf, *self.captured.values()]
        for number, cotangent in enumerate(cotangents, 1):
            keep = not ends or number < len(cotangents)
            self.mode.ledger.clear()
            try:
                with torch.inference_mode(False):
                    start = _copy(cotangent).to(self.output)
                    arriving = torch.autograd.grad(self.output, places, start, retain_graph=keep, allow_unused=True)
            except RuntimeError as error:
                if "modified by an inplace operation" in str(error):
                    raise MethodError(
                        "the network overwrites in place a tensor that the backward rule needs; set inplace=False "
                        f"on its activations ({error})"
                    ) from error
                raise
            filled = [torch.zeros_like(place) if g is None else g for place, g in zip(places, arriving)]
            yield filled[0], dict(zip(self.captured, filled[1:])), self.mode.ledger


def record(
    forward: Forward, x: Tensor, rules: Rules, layers: Mapping[str, nn.Module]
) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A pass that only keeps the operands of the operations with a rule; the layers' outputs, and the network's."""
    _check_input(forward, x)
    mode = RuleMode(rules, record=True)
    with torch.inference_mode(False), _eager(x), torch.no_grad(), _captured(layers, len(x)) as captured:
        start = mode.enter_input(_copy(x))
        with mode:
            output = forward(start)
    return mode.record, captured, output


def _copy(x: Tensor) -> Tensor:
    """A plain tensor (no MetaTensor) that the network may write into."""
    return x.detach().clone().as_subclass(Tensor)


def _check_input(forward: Forward, x: Tensor) -> None:
    if x.dtype not in _AGREEMENT:
        raise NetworkError(f"windows are {x.dtype}: rule-based methods need float32 or float64")
    owner = forward if isinstance(forward, nn.Module) else getattr(forward, "__self__", None)
    if isinstance(owner, nn.Module):
        check_network(owner)


def _check_agreement(output: Tensor, plain: Tensor) -> None:
    if output.shape != plain.shape:
        raise MethodError(f"the output under the rules has shape {tuple(output.shape)}, plain {tuple(plain.shape)}")
    scale = plain.abs().max()
    gap = (output - plain).abs().max()
    if not bool(gap <= _AGREEMENT[plain.dtype] * scale):
        raise MethodError(
            f"the output under the rules differs from the plain output by {float(gap):.3g} (largest value "
            f"{float(scale):.3g}): the network is random or keeps state between calls; put it in eval mode"
        )


@contextmanager
def _eager(x: Tensor) -> Iterator[None]:
    """Full precision, nothing compiled, and no activation checkpointing, which would recompute outside the mode."""

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        options = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
        return function(*args, **{name: value for name, value in kwargs.items() if name not in options})

    uncompiled = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
    checkpointing_off = mock.patch.object(torch.utils.checkpoint, "checkpoint", call)
    with torch.autocast(x.device.type, enabled=False), checkpointing_off, uncompiled:
        yield


@contextmanager
def _no_saved_tensor_hooks() -> Iterator[None]:
    """Refuse what :func:`_eager` could not switch off: checkpointing through a name imported earlier."""
    message = "activation checkpointing hides operations from the rule engine; switch use_checkpoint off"
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(message):
            yield
    except RuntimeError as error:
        if message in str(error):
            raise NetworkError(message) from error
        raise


@contextmanager
def _captured(layers: Mapping[str, nn.Module], windows: int) -> Iterator[dict[str, Tensor]]:
    """The outputs of ``layers`` as they leave the module, safe from a later write in place. Hooks are removed again.

    Raises:
        MethodError: a layer that runs twice or not at all.
        NetworkError: one that gives no tensor, or other rows than the windows.
    """
    captured: dict[str, Tensor] = {}

    def record(call: LayerCall) -> Any:
        value = first_tensor(call.name, call.output)
        check_rows(call.name, value, windows)
        if call.name in captured:
            raise MethodError(f"layer {call.name} runs twice in one pass; choose the layer around it")
        if call.returns_argument(value):  # else the input's other uses would count as the layer's
            value = value.clone()
        elif any(value is argument for argument in call.args):  # written in place: the input object goes on
            captured[call.name] = value.clone()
            value.copy_(captured[call.name])
            return call.output
        captured[call.name] = value
        return with_first(call.output, value.clone())

    with on_output(layers, record):
        yield captured
        missing = [name for name in layers if name not in captured]
        if missing:
            raise MethodError(f"layer {missing[0]} did not run in this forward pass; choose another layer")
