"""Recognition of activations written as several operations: ``x * torch.sigmoid(x)`` is SiLU.

Every result of elementwise operations stores its start, the tensor from which they began, and their composed function.
A product of two such results with the same start is a function of one tensor, so it receives the rule of an activation
instead of the rule of a product. The same holds for their maximum or minimum (``torch.maximum(x, 0.1 * x)`` is
LeakyReLU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.operations import Operation, Slot
from esegeta_monai.utils.upstream import write_count

__all__ = ["join_functions", "store_function"]

_CURVE = "_esegeta_curve"
_EXTREMES = ("maximum", "minimum", "max", "min")
_ELEMENTWISE = ("add", "sub", "rsub", "mul", "div", "neg")


@dataclass(frozen=True)
class _Curve:
    start: Tensor
    versions: tuple[int, int]  # write counts of start and result: a later in-place write to either ends the curve
    function: Callable[[Tensor], Tensor]


def _curve_of(tensor: Tensor) -> _Curve | None:
    curve: _Curve | None = getattr(tensor, _CURVE, None)
    return curve if curve is not None and _write_counts(curve.start, tensor) == curve.versions else None


def store_function(operation: Operation, operands: tuple[Tensor, ...], result: Any) -> None:
    """Store the start and the composed function on the result of an elementwise operation.

    Only a result of the same shape as its single operand is marked; all others are left unmarked.
    """
    if not isinstance(result, Tensor):
        return
    if hasattr(result, _CURVE):
        delattr(result, _CURVE)
    if operation.in_place or len(operands) != 1 or result.shape != operands[0].shape:
        return
    linear = operation.kind is Kind.LINEAR and operation.name in _ELEMENTWISE
    if not linear and operation.kind not in (Kind.ACTIVATION, Kind.UNIVARIATE):
        return
    before = _curve_of(operands[0])
    start = operands[0]
    function: Callable[..., Any] = operation.function
    if before is not None:
        start, function = before.start, _after(before.function, operation.function)
    setattr(result, _CURVE, _Curve(start, _write_counts(start, result), function))


def _write_counts(start: Tensor, result: Tensor) -> tuple[int, int]:
    return write_count(start), write_count(result)


def _after(first: Callable[[Tensor], Tensor], second: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: second(first(x))


def join_functions(operation: Operation, operands: tuple[Tensor, ...]) -> tuple[Operation, tuple[Tensor, ...]]:
    """Join the product, maximum or minimum of two functions of one tensor into one function of it.

    Returns:
        The joined operation and the tensor, of the shape of the operands; any other operation and its operands
        unchanged.
    """
    product = operation.name == "mul" and operation.kind is Kind.PRODUCT
    if not (product or (operation.name in _EXTREMES and len(operands) == 2)) or operation.in_place:
        return operation, operands
    left, right = (_curve_of(operand) for operand in operands)
    starts = [curve.start if curve else operand for curve, operand in zip((left, right), operands)]
    if starts[0] is not starts[1] or (left is None and right is None):
        return operation, operands

    def together(x: Tensor) -> Tensor:
        result: Tensor = operation.function(left.function(x) if left else x, right.function(x) if right else x)
        return result

    whole = Operation(f"{operation.name}_of_functions", together, (Slot(0),), {}, ledger=operation.ledger)
    whole.kind, whole.reads_input = Kind.ACTIVATION, operation.reads_input
    return whole, (starts[0],)
