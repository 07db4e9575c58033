"""One call as the rules see it: a canonical name for every spelling, its arguments by name, and its kind.

``x + y``, ``x.add_(y)`` and ``torch.add(x, y)`` are the operation ``add``; ``nn.ReLU(inplace=True)(x)``, ``F.relu(x)``
and ``torch.relu_(x)`` are ``relu``.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from esegeta_monai.engine.rules.kinds import CUTS, INERT, KINDS, Kind
from esegeta_monai.errors import RuleError

__all__ = [
    "Operation",
    "Slot",
    "canonical_name",
    "is_inert",
    "kind_of",
    "map_tensors",
    "operation_signature",
    "where_in_network",
]


# Special methods of Python operators; excludes __float__ and the like.
_OPERATORS = frozenset(("add", "sub", "mul", "truediv", "div", "matmul", "pow"))
_SYMBOLS = frozenset(("getitem", "iter", "reversed", "neg", "abs", "pos", "invert"))
_ALIASES = {
    "_threshold": "threshold",
    "pos": "positive",
    "multiply": "mul",
    "true_divide": "div",
    "divide": "div",
    "truediv": "div",
    "rtruediv": "rdiv",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "radd": "add",
    "rmul": "mul",
    "linalg_norm": "norm",
    "linalg_vector_norm": "vector_norm",
    "bitwise_invert": "bitwise_not",
    "invert": "bitwise_not",
    "ger": "outer",
    "special_expit": "sigmoid",
}
# The parameters of operations written in C++, which have no Python signature.
_SIGNATURES = {
    "conv": "input weight bias stride padding dilation groups",
    "conv_transpose": "input weight bias stride padding output_padding groups dilation",
    "linear": "input weight bias",
    "batch_norm": "input weight bias running_mean running_var training momentum eps",
    "instance_norm": "input weight bias running_mean running_var use_input_stats momentum eps",
    "prelu": "input weight",
    "avg_pool": "input kernel_size stride padding ceil_mode count_include_pad divisor_override",
    "max_pool": "input kernel_size stride padding dilation ceil_mode return_indices",
    "adaptive_max_pool": "input output_size return_indices",
    "softmax": "input dim dtype",
    "log_softmax": "input dim dtype",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale enable_gqa",
    "pow": "input exponent",
    "rpow": "input exponent",
    "float_power": "input exponent",
    "mul": "input other",
    "div": "input other rounding_mode",
    "rdiv": "input other",
    "amax": "input dim keepdim",
    "amin": "input dim keepdim",
    "max": "input dim keepdim",
    "min": "input dim keepdim",
    "maximum": "input other",
    "minimum": "input other",
    "std": "input dim unbiased keepdim",
    "var": "input dim unbiased keepdim",
    "std_mean": "input dim unbiased keepdim",
    "var_mean": "input dim unbiased keepdim",
    "norm": "input p dim keepdim dtype",
    "vector_norm": "input ord dim keepdim dtype",
    "logsumexp": "input dim keepdim",
    "addcmul": "input tensor1 tensor2 value",
    "addcdiv": "input tensor1 tensor2 value",
    "addmm": "input mat1 mat2 beta alpha",
    "addbmm": "input mat1 mat2 beta alpha",
    "baddbmm": "input mat1 mat2 beta alpha",
    "addmv": "input mat1 mat2 beta alpha",
    "lerp": "input end weight",
    "where": "condition input other",
    "cosine_similarity": "x1 x2 dim eps",
    "group_norm": "input num_groups weight bias eps",
    "layer_norm": "input normalized_shape weight bias eps",
    "dropout": "input p train",
    "alpha_dropout": "input p train",
    "feature_dropout": "input p train",
    "feature_alpha_dropout": "input p train",
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "max_pool": {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    "scaled_dot_product_attention": {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False},
    "norm": {"p": "fro", "keepdim": False},
    "vector_norm": {"ord": 2, "keepdim": False},
    "amax": {"dim": (), "keepdim": False},
    "amin": {"dim": (), "keepdim": False},
    "addcmul": {"value": 1},
    "addcdiv": {"value": 1},
    "addmm": {"beta": 1, "alpha": 1},
    "addbmm": {"beta": 1, "alpha": 1},
    "baddbmm": {"beta": 1, "alpha": 1},
    "addmv": {"beta": 1, "alpha": 1},
    "cosine_similarity": {"dim": 1, "eps": 1e-8},
    "group_norm": {"eps": 1e-5},
    "layer_norm": {"eps": 1e-5},
    "conv": {"stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "conv_transpose": {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1, "groups": 1},
}


@functools.cache
def canonical_name(func: Callable[..., Any]) -> tuple[str, bool]:
    """Return the canonical name of an operation, and True if this spelling writes into its first argument.

    >>> canonical_name(Tensor.add_), canonical_name(nn.functional.conv3d)
    (('add', True), ('conv', False))
    """
    name = getattr(func, "__name__", type(func).__name__)
    if name in ("__get__", "__set__", "__delete__"):  # a property of Tensor, such as x.shape
        attribute = getattr(getattr(func, "__self__", None), "__name__", name)
        return (attribute, False) if name == "__get__" else (f"{name}{attribute}", True)
    if name in INERT or name in CUTS:
        return name, False
    in_place = False
    if name.startswith("__") and name.endswith("__"):
        bare = name[2:-2]
        if bare == "setitem" or (bare.startswith("i") and bare[1:] in _OPERATORS):
            in_place, name = True, bare if bare == "setitem" else bare[1:]
        elif bare in _OPERATORS or bare in _SYMBOLS or (bare[0] == "r" and bare[1:] in _OPERATORS):
            name = bare
    elif name.endswith("_"):
        in_place, name = True, name[:-1]
    name = re.sub(r"_with_indices$", "", name)
    name = re.sub(r"(?<=[a-z])[123]d(?=$|_)", "", name) if not name.startswith("atleast") else name
    return _ALIASES.get(name, name), in_place


def is_inert(name: str) -> bool:
    """Return True for a query about a tensor (shape, device, …) whose result does not depend on its values."""
    return name in INERT


@functools.cache
def operation_signature(func: Callable[..., Any], name: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the parameter names of ``func`` in order, and the known defaults."""
    if inspect.isfunction(func) and name not in ("max_pool", "adaptive_max_pool", "norm"):
        parameters = inspect.signature(func, follow_wrapped=False).parameters.values()
        if all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters):
            names = tuple("input" if p.name == "self" else p.name for p in parameters)
            return names, {p.name: p.default for p in parameters if p.default is not p.empty}
    return tuple(_SIGNATURES.get(name, "input").split()), _DEFAULTS.get(name, {})


@dataclass(frozen=True)
class Slot:
    """A placeholder for an operand (a tensor that depends on the input) in the arguments of a call."""

    index: int


def map_tensors(visit: Callable[[Tensor], Any], value: Any) -> Any:
    """Replace every tensor, of any shape, in the tuples, lists and dictionaries of ``value`` by ``visit(tensor)``."""
    if isinstance(value, Tensor):
        return visit(value)
    if isinstance(value, tuple):
        items = [map_tensors(visit, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, list):
        return [map_tensors(visit, item) for item in value]
    if isinstance(value, dict):
        return {key: map_tensors(visit, item) for key, item in value.items()}
    return value


def _fill(value: Any, operands: tuple[Tensor, ...]) -> Any:
    if isinstance(value, Slot):
        return operands[value.index]
    if isinstance(value, tuple):
        return tuple(_fill(item, operands) for item in value)
    if isinstance(value, list):
        return [_fill(item, operands) for item in value]
    if isinstance(value, dict):
        return {key: _fill(item, operands) for key, item in value.items()}
    return value


@dataclass
class Operation:
    """One call as a function of its *operands*, the tensors that depend on the network's input.

    ``args`` and ``kwargs`` contain all other arguments (weights, masks, sizes) unchanged, with a :class:`Slot` in place
    of each operand. The operands are not stored, so that an operation does not keep a graph alive.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool = False
    #: The :class:`esegeta_monai.engine.rules.mode.RelevanceLedger` of the backward pass.
    ledger: Any = None
    #: The operands of the same call in the pass over the reference input (finite differences only).
    reference: tuple[Tensor, ...] = ()
    #: True if only moves come between the network's input and the operands.
    reads_input: bool = False
    #: True if no operation with weights follows this one (set after the forward pass).
    is_top: bool = False
    kind: Kind = field(init=False)

    def function(self, *operands: Tensor) -> Any:
        """Compute the plain operation on operands of the original shapes, never in place.

        The result has the values and the shape of the original call.
        """
        args, kwargs = _fill(self.args, operands), _fill(self.kwargs, operands)
        if not self.in_place:
            return self.func(*args, **kwargs)
        if args:
            target = args[0].clone()
            args = (target, *args[1:])
        else:
            target = kwargs["input"].clone()
            kwargs = {**kwargs, "input": target}
        result = self.func(*args, **kwargs)
        return target if result is None else result

    @functools.cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, with known defaults; operands appear as :class:`Slot`."""
        names, defaults = operation_signature(self.func, self.name)
        bound = {**defaults, **dict(zip(names, self.args)), **self.kwargs}
        if self.name in ("max_pool", "avg_pool") and not bound.get("stride"):
            bound["stride"] = bound["kernel_size"]
        return bound

    def argument(self, name: str, default: Any = None) -> Any:
        """Return an argument by name, or ``default`` if the call does not contain it."""
        return self.arguments.get(name, default)

    def filled(self, operands: tuple[Tensor, ...]) -> dict[str, Any]:
        """Return :attr:`arguments` with the slots replaced by ``operands``, each of the same shape as the original."""
        filled: dict[str, Any] = _fill(self.arguments, operands)
        return filled

    def slots(self) -> Iterator[Slot]:
        """Yield the slots of the operands in the order of the call."""

        def walk(value: Any) -> Iterator[Slot]:
            if isinstance(value, Slot):
                yield value
            elif isinstance(value, (tuple, list)):
                for item in value:
                    yield from walk(item)
            elif isinstance(value, dict):
                yield from walk(tuple(value.values()))

        yield from walk(self.args)
        yield from walk(self.kwargs)

    def error(self, reason: str) -> RuleError:
        """Return an error that names the operation, its place in the network, and the alternative."""
        return RuleError(
            f"operation {self.name!r}{where_in_network()}: {reason}; use a gradient or perturbation method "
            "for this network"
        )


def kind_of(operation: Operation) -> Kind:
    """Return the kind of an operation.

    The kind depends on which arguments are operands: a product with a constant is linear, a convolution whose weights
    are computed from the input is a product, a quotient is composite only if its denominator depends on the input.

    Raises:
        RuleError: the operation has no kind.
    """
    name = operation.name
    slots = list(operation.slots())
    if "out" in operation.kwargs and operation.kwargs["out"] is not None:
        raise operation.error("a call with out= has no rule")
    if name == "batch_norm":
        if operation.argument("training") or operation.argument("running_mean") is None:
            raise operation.error(
                "batch norm takes its statistics from the batch here (track_running_stats=False, or training=True in "
                "forward), so it mixes the images of a batch, which relevance cannot separate; gradient and "
                "perturbation methods run the windows one by one"
            )
        return Kind.LINEAR
    if name == "instance_norm" and operation.argument("use_input_stats") is False:
        return Kind.LINEAR
    if "dropout" in name:
        if operation.argument("training", operation.argument("train", True)):
            raise operation.error(
                "dropout is random here, because it is called with training=True (the default of F.dropout); pass "
                "training=self.training"
            )
        return Kind.MOVE
    if name == "rrelu" and operation.argument("training"):
        raise operation.error("its slopes are random with training=True; pass training=self.training")
    if name in ("addmm", "addbmm", "baddbmm", "addmv", "lerp") and len(slots) == 1:
        return Kind.LINEAR
    if name == "div":
        if operation.argument("rounding_mode") is not None:
            raise operation.error("a rounding division has no derivative")
        return Kind.COMPOSITE if isinstance(operation.argument("other"), Slot) else Kind.LINEAR
    if name == "grid_sample":
        if isinstance(operation.argument("grid"), Slot):
            raise operation.error("a sampling grid that is computed from the input has no rule")
        return Kind.LINEAR
    if name in ("linear", "conv", "conv_transpose"):
        if isinstance(operation.argument("bias"), Slot):
            raise operation.error("a bias that is computed from the input has no rule")
        if isinstance(operation.argument("weight"), Slot):
            return Kind.PRODUCT if len(slots) == 2 else Kind.LINEAR
    kind = KINDS.get(name)
    if kind is None:
        raise operation.error("no rule is known for it")
    if kind is Kind.PRODUCT and len(slots) == 1:
        return Kind.LINEAR
    if kind is Kind.PRODUCT and len(slots) > 2:
        raise operation.error("a product of more than two tensors that depend on the input has no rule")
    if kind in (Kind.ACTIVATION, Kind.UNIVARIATE) and len(slots) != 1:
        raise operation.error("its parameters are computed from the input")
    if name in ("maximum", "minimum", "max", "min") and len(slots) == 1:
        pair = (operation.argument("input"), operation.argument("other", operation.argument("dim")))
        if any(isinstance(value, Tensor) for value in pair):
            return Kind.ACTIVATION  # the larger of x and a constant, as in ReLU
    return kind


def where_in_network() -> str:
    """Return the running module and its dotted name from the call stack, such as `` in Conv3d (encoder.0.conv)``."""
    inner: nn.Module | None = None
    outer: nn.Module | None = None
    frame: Any = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if "self" in frame.f_code.co_varnames else None
        if isinstance(owner, nn.Module):
            inner, outer = inner if inner is not None else owner, owner
        frame = frame.f_back
    if inner is None or outer is None:
        return ""
    path = next((path for path, module in outer.named_modules() if module is inner), "")
    return f" in {type(inner).__name__}" + (f" ({path})" if path else "")
