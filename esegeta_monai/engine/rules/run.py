"""One pass of a rule-based method: a checked forward pass under the rules and one backward pass per target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.hooks import LayerCall, check_rows, first_tensor, on_output, with_first
from esegeta_monai.engine.rules.mode import RuleMode, Rules
from esegeta_monai.errors import InputError, MethodError, NetworkError
from esegeta_monai.utils.upstream import compiled_original, without_checkpoints

__all__ = ["Compare", "Forward", "LayerRelevance", "Relevance", "Run", "check_network"]

Forward = Callable[[Tensor], Tensor]

Compare = bool | Forward
"""True compares the output under the rules with the plain output, which costs one more forward pass; False does not.

A function computes the plain output in place of the network, for all windows or the first ones.
"""

#: Permitted difference between the output under the rules and the plain output, relative to the largest value of the
#: latter. Decomposed operations round differently.
_AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class LayerRelevance:
    """The result of a method at the output of one module.

    Attributes:
        activation: output of the module, (n, …).
        gradient: backward signal under the rules, (k, n, …): a modified gradient, a multiplier, or relevance.
        relevance: attribution of the output, (k, n, …).
    """

    activation: Tensor
    gradient: Tensor
    relevance: Tensor


@dataclass(frozen=True)
class Relevance:
    """Attributions of k targets for n windows.

    Attributes:
        input: attribution of the input, (k, n, C, *roi).
        absorbed: relevance absorbed by biases and other constants, (k, n); zero for methods without absorption.
        output: output of the network, (n, K, …).
        layers: attribution at the output of each requested module.
        at_baseline: output of the network for the baseline, (n, K, …); None for methods without one.
    """

    input: Tensor
    absorbed: Tensor
    output: Tensor
    layers: Mapping[str, LayerRelevance] = field(default_factory=dict)
    at_baseline: Tensor | None = None


def check_network(network: nn.Module) -> None:
    """Check that rules can be applied to a network.

    Raises:
        NetworkError: it is TorchScript, compiled, or has half-precision weights.
    """
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
    """A forward pass under rules, kept with its graph for one backward pass per target.

    Args:
        forward: maps windows (n, C, *roi) to outputs (n, K, …).
        x: windows (n, C, *roi), float32 or float64.
        rules: the method's rules.
        reference: a recorded pass (see :class:`RuleMode`).
        layers: modules whose outputs are recorded.
        compare: see `Compare`.

    Raises:
        NetworkError: the rules cannot be applied to the network or to the dtype of the windows.
        MethodError: the output under the rules differs from the plain one.
        RuleError: an operation has no rule.
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
        if not self.mode.depends_on_input(self.output):
            reason = self.mode.reason(self.output)
            if reason is not None:
                raise reason
            raise NetworkError(
                "the output was computed by code that the rule engine cannot see (TorchScript, a compiled "
                "function, a custom autograd.Function); use the eager network, or a perturbation method"
            )
        if compare is not False:
            output = self.output.detach()
            _check_agreement(output if compare is True else output[: len(plain)], plain)

    def backward(self, cotangents: Tensor, *, ends: bool = False) -> Iterator[tuple[Tensor, dict[str, Tensor], Any]]:
        """Yield per target: the signal at the input (n, C, *roi), the signals at the layers, the ledger of this pass.

        Args:
            cotangents: (k, n, K, …).
            ends: True: the pass of the last target may free the graph.

        Raises:
            InputError: the cotangents do not fit the output.
            MethodError: the network overwrites a tensor that a rule needs.
        """
        if cotangents.shape[1:] != self.output.shape:
            raise InputError(
                f"cotangents of shape {tuple(cotangents.shape)} do not fit outputs of shape "
                f"{tuple(self.output.shape)}: expected (targets, *output shape)"
            )
        captured = {name: value for name, value in self.captured.items() if value.requires_grad}
        places = [self.leaf, *captured.values()]
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
            unused = {name: torch.zeros_like(value) for name, value in self.captured.items()}  # the output has no use
            yield filled[0], unused | dict(zip(captured, filled[1:])), self.mode.ledger


def record(
    forward: Forward, x: Tensor, rules: Rules, layers: Mapping[str, nn.Module]
) -> tuple[Any, dict[str, Tensor], Tensor]:
    """Run a pass on windows ``x`` (n, C, *roi) that records the operands of the operations with a rule.

    Returns:
        The record, the outputs of the layers by name, and the output of the network (n, K, …).
    """
    _check_input(forward, x)
    mode = RuleMode(rules, record=True)
    # gradients are on, so that the mode sees a no_grad block of the network; the input needs none, so no graph is built
    with torch.inference_mode(False), _eager(x), torch.enable_grad(), _captured(layers, len(x)) as captured:
        start = mode.enter_input(_copy(x))
        with mode:
            output = forward(start)
    return mode.record, captured, output


def _copy(x: Tensor) -> Tensor:
    """Copy to a plain tensor (no MetaTensor) that the network may write into."""
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
            f"{float(scale):.3g}): also in evaluation mode the network is random (F.dropout, noise) or keeps state "
            "between calls, so relevance does not belong to its output; use a perturbation method"
        )


@contextmanager
def _eager(x: Tensor) -> Iterator[None]:
    """Switch off autocast, compilation, and activation checkpointing, which would recompute outside the mode."""
    uncompiled = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
    with torch.autocast(x.device.type, enabled=False), without_checkpoints(), uncompiled:
        yield


@contextmanager
def _no_saved_tensor_hooks() -> Iterator[None]:
    """Reject saved-tensor hooks: of checkpointing that is not torch's, which :func:`_eager` cannot switch off."""
    message = (
        "hooks on saved tensors (save_on_cpu, activation checkpointing by another package than torch) hide operations "
        "from the rule engine; switch them off"
    )
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(message):
            yield
    except RuntimeError as error:
        if message in str(error):
            raise NetworkError(message) from error
        raise


@contextmanager
def _captured(layers: Mapping[str, nn.Module], windows: int) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of ``layers`` by hooks while the block runs, protected from later in-place writes.

    Raises:
        MethodError: a layer runs several times or not at all.
        NetworkError: its output is no tensor, or its first axis is not the windows.
    """
    captured: dict[str, Tensor] = {}

    def record(call: LayerCall) -> Any:
        value = first_tensor(call.name, call.output)
        check_rows(call.name, value, windows)
        if call.name in captured:
            raise MethodError(f"layer {call.name!r} runs several times in a pass: choose one that runs once")
        if call.returns_argument(value):  # otherwise other uses of the input would count as uses of the layer
            value = value.clone()
        elif any(value is argument for argument in call.args):  # in place: the network goes on with the input object
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
