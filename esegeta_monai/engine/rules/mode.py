"""The rule engine: a forward pass that can replace the backward rule of every operation.

A :class:`RuleMode` is a ``torch.overrides.TorchFunctionMode``. While it is active, it intercepts every call of a torch
function: from a module, from functional code, in place, or from a module that is used twice. It determines the name of
the operation, obtains the treatment of this operation from the method's rules, and computes the same values with the
replaced backward. The network itself is not modified: no hook, no flag, no weight.

No operation can go unnoticed. Every tensor that depends on the input carries a mark that only the mode sets. A tensor
that depends on the input without a mark was computed by TorchScript, a compiled function, a custom
``autograd.Function`` or a ``no_grad`` block, and raises an error.

Operations without a rule are computed, and their results are marked with the reason. It is raised only if the output
depends on them: a network may keep a statistic of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from esegeta_monai.engine.rules.curves import join_functions, store_function
from esegeta_monai.engine.rules.decompositions import decompose
from esegeta_monai.engine.rules.kinds import CUTS, DIFFERENTIATES, LIKE, Kind
from esegeta_monai.engine.rules.operations import (
    Operation,
    Slot,
    canonical_name,
    is_inert,
    kind_of,
    map_tensors,
    where_in_network,
)
from esegeta_monai.errors import NetworkError, RuleError
from esegeta_monai.utils.upstream import active_transform, is_view, transformed_value, view_base

__all__ = ["OPERATION_RULES", "PARTS", "PLAIN", "Family", "RelevanceLedger", "Rule", "RuleMode", "Rules", "Treatment"]
__all__ += ["local_gradient"]

#: Treatment: use the plain gradient.
PLAIN: Literal["plain"] = "plain"
#: Treatment: decompose the operation and apply a rule to each part.
PARTS: Literal["parts"] = "parts"


class Rule(Protocol):
    """A backward rule: it maps the backward signal at the result of an operation to signals at its operands."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the backward signal at each operand.

        Args:
            operation: the call; ``operation.argument(name)`` is one of its arguments, ``operation.function(*operands)``
                its result, ``operation.reference`` the operands at the baseline (DeepLIFT).
            operands: the tensors that depend on the network's input.
            gradient: backward signal at the result, of its shape: a gradient, a multiplier, or a probability.

        Returns:
            One tensor per operand, of its shape; None for zeros.
        """


Treatment = Rule | Literal["plain", "parts"]

Family = Literal["guided", "deconvolution", "lrp", "deep_lift", "excitation"]
"""The methods for which `esegeta_monai.engine.rules.register_operation` accepts a rule."""

OPERATION_RULES: dict[tuple[str, str], Rule] = {}
"""Rules of registered operations, by family and operation name."""


class Rules(Protocol):
    """The rules of one method: a treatment for each operation."""

    @property
    def family(self) -> str:
        """The `Family`; any other name excludes the rules of registered operations."""

    def treatment(self, operation: Operation) -> Treatment:
        """Return the rule of this operation, ``PLAIN``, or ``PARTS``."""


@dataclass
class RelevanceLedger:
    """Quantities that the rules of one backward pass report beside the gradients that they return."""

    #: Relevance that biases and other constants absorb, so that it does not reach the input.
    absorbed: Tensor | float = 0.0
    #: Pairs (tensor, relevance instead of multipliers) of tensors that are moves of the input.
    direct: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def absorb(self, amount: Tensor) -> None:
        """Add the sum of ``amount``, of any shape, to the absorbed relevance."""
        self.absorbed = self.absorbed + amount.sum()

    def clear(self) -> None:
        """Reset the ledger for the next backward pass."""
        self.absorbed, self.direct = 0.0, []


def local_gradient(
    function: Callable[..., Any], operands: Iterable[Tensor], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the vector-Jacobian product of ``function`` at ``operands``, outside any other graph.

    Args:
        function: maps the operands to a tensor, or to (values, indices).
        operands: tensors of any shape.
        gradient: the vector, of the shape of the result.

    Returns:
        One tensor per operand, of its shape; None where the result does not depend on it.
    """
    with torch.enable_grad():
        leaves = tuple(operand.detach().requires_grad_() for operand in operands)
        result = _first(function(*leaves))
    return torch.autograd.grad(result, leaves, gradient, allow_unused=True)


def _first(result: Any) -> Tensor:
    """Return a tensor as it is, or the values where an operation returns (values, indices)."""
    tensor: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return tensor


class _Replaced(torch.autograd.Function):
    """The forward of an operation with the backward of a rule; saved operands let torch detect a later overwrite."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, operation: Operation, *operands: Tensor) -> Any:
        ctx.rule, ctx.operation = rule, operation
        ctx.save_for_backward(*operands)
        result = operation.function(*operands)
        values = _first(result)
        if is_view(values) or any(values is operand for operand in operands):
            values = values.clone()  # a result that shares memory with an operand could not be written into later
        if values is result or isinstance(result, Tensor):
            return values
        rest = tuple(result[1:])
        ctx.mark_non_differentiable(*rest)
        return (values, *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        operands = ctx.saved_tensors
        arriving = ctx.rule.backward(ctx.operation, operands, gradients[0])
        return None, None, *arriving


_MARK = "_esegeta_mark"
_ALIAS = "_esegeta_alias"
_CUT = object()


class RuleMode(TorchFunctionMode):
    """Mode that replaces the backward rules of all operations on the tensor that :meth:`enter_input` marks.

    Args:
        rules: the method's rules.
        record: keep the operands of every operation that has a rule, in order, and build no graph (the pass over the
            reference input of finite differences).
        reference: such a record of another input; rules read its operands in ``operation.reference``.
    """

    def __init__(
        self, rules: Rules, *, record: bool = False, reference: list[tuple[str, tuple[Tensor, ...]]] | None = None
    ) -> None:
        super().__init__()
        self.rules = rules
        self.ledger = RelevanceLedger()
        self.record: list[tuple[str, tuple[Tensor, ...]]] | None = [] if record else None
        self.reference = reference
        self.replayed = 0
        #: Number of operations of each kind.
        self.operation_counts: dict[Kind, int] = {}
        self._token = object()
        self._statistics: list[Tensor] = []
        """Constants into which the network wrote values that have no rule."""

    # -- marks: which tensors depend on the input, and by which path ------------------------------------------------

    def enter_input(self, x: Tensor) -> Tensor:
        """Mark ``x``, of any shape, as the input and return it; the rules act on everything computed from it."""
        self._mark(x, reads_input=True)
        return x

    def _mark(self, result: Any, reads_input: bool = False) -> Any:
        def mark(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                setattr(tensor, _MARK, (self._token, tensor.grad_fn, reads_input))
            else:
                setattr(tensor, _MARK, (self._token, _CUT, False))
            return tensor

        map_tensors(mark, result)
        return result

    def _mark_of(self, tensor: Tensor) -> tuple[Any, Any, bool] | None:
        mark = getattr(tensor, _MARK, None)
        return mark if mark is not None and mark[0] is self._token else None

    def depends_on_input(self, tensor: Tensor) -> bool:
        """Return True if a tensor, of any shape, depends on the input by operations that the mode intercepted."""
        mark = self._mark_of(tensor)
        return mark is not None and mark[1] is not _CUT and (mark[1] is tensor.grad_fn)

    def reason(self, tensor: Tensor) -> RuleError | None:
        """Return why relevance cannot flow to a tensor of any shape; None if each operation before it has a rule."""
        mark = self._mark_of(tensor)
        return mark[1] if mark is not None and isinstance(mark[1], RuleError) else None

    # -- the mode ---------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = canonical_name(func)
        if is_inert(name):
            return func(*args, **kwargs)
        if (transform := active_transform()) is not None:
            return self._transformed(transform, name, func, args, kwargs)
        if name in LIKE:
            args = (*args[:1], *map_tensors(Tensor.detach, tuple(args[1:])))
            kwargs = {k: v if k in ("input", "self") else map_tensors(Tensor.detach, v) for k, v in kwargs.items()}
        in_place = in_place or is_in_place(func, name, args, kwargs)
        target = (args[0] if args else next(iter(kwargs.values()))) if in_place else None
        barred: RuleError | None = None
        operands: list[Tensor] = []
        constants: list[Tensor] = []
        reads_input = True

        def visit(tensor: Tensor) -> Any:
            nonlocal reads_input, barred
            mark = self._mark_of(tensor)
            if mark is None:
                if tensor.requires_grad and not tensor.is_leaf:
                    raise RuleError(
                        f"operation {name!r}{where_in_network()}: its argument was computed by code that the rule "
                        "engine cannot see (TorchScript, a compiled function, a custom autograd.Function); use the "
                        "eager network and plain torch operations, or a gradient or perturbation method"
                    )
                constants.append(tensor)
                return tensor.detach() if tensor.requires_grad else tensor  # parameters enter as constants
            if mark[1] is _CUT or isinstance(mark[1], RuleError):
                if name not in CUTS and barred is None:
                    barred = mark[1] if isinstance(mark[1], RuleError) else _without_gradient(name)
                return tensor
            if mark[1] is not tensor.grad_fn:
                raise RuleError(
                    f"operation {name!r}{where_in_network()}: its argument was changed by code that the rule "
                    "engine cannot see (a custom autograd.Function, a write into shared memory); use plain torch "
                    "operations, or a gradient or perturbation method"
                )
            reads_input = reads_input and mark[2]
            operands.append(tensor)
            return Slot(len(operands) - 1)

        slotted_args, slotted_kwargs = map_tensors(visit, tuple(args)), map_tensors(visit, dict(kwargs))
        if name in CUTS:
            result = func(*args, **kwargs)
            tainted = operands or any(self._mark_of(t) for t in _tensors((args, kwargs)))
            if tainted and isinstance(result, Tensor):
                result = result.view(result.shape) if any(result is t for t in _tensors((args, kwargs))) else result
                setattr(result, _MARK, (self._token, _CUT, False))
            elif name in ("data", "detach"):
                setattr(result, _ALIAS, args[0])
            return result
        if name in DIFFERENTIATES and (operands or barred is not None):
            raise RuleError(
                f"operation {name!r}{where_in_network()}: the network differentiates in its forward pass, which no "
                "rule follows; use a gradient or perturbation method"
            )
        if barred is not None:
            return self._without_rule(barred, func, args, kwargs, target)
        if not operands:
            return func(*map_tensors(_as_constant, tuple(args)), **map_tensors(_as_constant, dict(kwargs)))
        if target is not None:
            operands = [operand.clone() if operand is target else operand for operand in operands]
        operation = Operation(name, func, slotted_args, slotted_kwargs, in_place, self.ledger)
        try:
            if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
                raise operation.error("it runs without gradients (no_grad, inference_mode, a custom autograd.Function)")
            operation.kind = kind_of(operation)
        except RuleError as error:
            return self._without_rule(error, func, args, kwargs, target)
        operation.reads_input = reads_input
        result = self._apply(*join_functions(operation, tuple(operands)))
        store_function(operation, tuple(operands), result)
        moved = reads_input and operation.kind is Kind.MOVE and not constants
        if target is not None:
            self._write_back(operation, target, _first(result))
            return target if name != "setitem" else None
        self._check_precision(operation, result)
        return self._mark(result, moved)

    def _transformed(
        self, transform: str, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute an operation of constants inside a transform of ``torch.func``, whose results carry no marks."""
        if any(self._mark_of(transformed_value(tensor)) is not None for tensor in _tensors((args, kwargs))):
            raise RuleError(
                f"operation {name!r}{where_in_network()}: it runs inside torch.func.{transform}, where the rule engine "
                "cannot follow the tensors; use a network without it, or a gradient or perturbation method"
            )
        return func(*args, **kwargs)

    def _without_rule(
        self,
        error: RuleError,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        target: Tensor | None,
    ) -> Any:
        """Compute an operation that has no rule, and mark its results with the error, which is raised if the output
        depends on them. It is raised at once where that could not be seen: results that are no tensors, and writes into
        tensors that depend on the input."""
        into = [t for t in (target, kwargs.get("out")) if isinstance(t, Tensor)]
        if any(self._mark_of(t) is not None and not any(t is own for own in self._statistics) for t in into):
            raise error

        def without_graph(tensor: Tensor) -> Tensor:
            return tensor if any(tensor is t for t in into) else tensor.detach()

        result = func(*map_tensors(without_graph, tuple(args)), **map_tensors(without_graph, dict(kwargs)))
        returned = result if isinstance(result, (tuple, list)) else [result]
        if target is None and not all(isinstance(r, Tensor) for r in returned):
            raise error
        for tensor in into:
            self._statistics.append(tensor)
            memory: Tensor | None = tensor
            while memory is not None:  # the tensors whose memory it shares
                setattr(memory, _MARK, (self._token, error, False))
                memory = getattr(memory, _ALIAS, None) if view_base(memory) is None else view_base(memory)
        for tensor in _tensors(result):
            setattr(tensor, _MARK, (self._token, error, False))
        return result

    def _write_back(self, operation: Operation, target: Tensor, result: Tensor) -> None:
        """Write the result of an in-place call: a network may use the written tensor and ignore the returned one."""
        if result.shape != target.shape:
            raise operation.error("an in-place change of shape has no rule")
        target.copy_(result)
        self._mark(target)
        base = view_base(target)
        if base is not None:  # a write into a view changes its base as well
            self._mark(base)

    def _apply(self, operation: Operation, operands: tuple[Tensor, ...]) -> Any:
        self.operation_counts[operation.kind] = self.operation_counts.get(operation.kind, 0) + 1
        registered = OPERATION_RULES.get((self.rules.family, operation.name))
        treatment = self.rules.treatment(operation) if registered is None else registered
        if treatment == PLAIN:
            return operation.function(*operands)
        if treatment == PARTS:
            with self:  # the parts pass through the mode again, so that each receives its rule
                return decompose(operation, operands)
        assert not isinstance(treatment, str)
        if self.record is not None:
            self.record.append((operation.name, tuple(operand.detach() for operand in operands)))
            return operation.function(*operands)
        if self.reference is not None:
            operation.reference = self._replay(operation, operands)
        return _Replaced.apply(treatment, operation, *operands)

    def _replay(self, operation: Operation, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self.reference is not None
        if self.replayed < len(self.reference):
            name, reference = self.reference[self.replayed]
            self.replayed += 1
            if name == operation.name and [t.shape for t in reference] == [t.shape for t in operands]:
                return reference
        raise operation.error("the network takes another path for the baseline than for the input")

    @staticmethod
    def _check_precision(operation: Operation, result: Any) -> None:
        for tensor in _tensors(result):
            if tensor.dtype in (torch.float16, torch.bfloat16):
                raise NetworkError(
                    f"operation {operation.name!r}{where_in_network()} computes in {tensor.dtype}: "
                    "rule-based methods need float32 or float64; run the network in float32 for them"
                )


def _without_gradient(name: str) -> RuleError:
    return RuleError(
        f"operation {name!r}{where_in_network()}: it uses a value without a gradient to the input (detach, a "
        "comparison, an index), so relevance cannot flow; use a perturbation method"
    )


def _as_constant(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad and tensor.is_leaf else tensor


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_tensors(tensors.append, value)
    return tensors


def is_in_place(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True for calls such as ``F.relu(x, inplace=True)``, by keyword or by position."""
    if kwargs.get("inplace"):
        return True
    code = getattr(func, "__code__", None)
    if code is None or "inplace" not in code.co_varnames[: code.co_argcount]:
        return False
    position = code.co_varnames.index("inplace")
    return len(args) > position and bool(args[position])
