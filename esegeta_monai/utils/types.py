"""Checks of parameters against their annotations; values from JSON, shells and notebooks may have any type."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

from esegeta_monai.errors import UsageError

__all__ = ["as_declared", "check_stated", "fit_parameters", "is_family", "number"]

UNFIT: Final = object()
"""Result of `as_declared` for a value of another type."""

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a file"}
WORDS |= {Tensor: "a tensor", types.NoneType: "None"}
BOOLS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False}
"""Shells pass booleans as text; ``bool("false")`` would be True."""
SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}


def fit_parameters(owner: Any, names: Sequence[str]) -> None:
    """Check parameters against their annotations, in the class or in ``__init__``; whole floats become whole numbers.

    Only numbers, texts, choices, files, tensors and sequences of them are checked; the class checks parameters
    of other types itself.

    Raises:
        UsageError: a value is of another type, a number is NaN, or ``__init__`` does not store a parameter.
    """
    cls: Any = type(owner)
    hints: dict[str, Any] = _hints(cls)
    for name in names:
        if not hasattr(owner, name):
            raise UsageError(f"{cls.__name__}: __init__ must keep its parameter as self.{name}, for records and copies")
        value = getattr(owner, name)
        fitted = as_declared(value, hints.get(name, Any))
        if fitted is UNFIT:
            text = " ".join(repr(value).split())
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise UsageError(f"{cls.__name__}: {name}={shown}: give {_words(hints[name])}")
        if fitted is not value:
            setattr(owner, name, fitted)


def check_stated(cls: type, hints: Mapping[str, Any]) -> None:
    """Check class attributes that every class must state, when the class is defined.

    A family base (see `is_family`) may leave them open; what it states is checked all the same. Text may be a property.

    Raises:
        UsageError: one is missing or of another type; names class, attribute and permitted values.
    """
    for name, hint in hints.items():
        value = getattr(cls, name, UNFIT)
        computed = hint is str and isinstance(value, (property, functools.cached_property))
        permitted = f"give {_words(hint)}" + (" or a property" if hint is str else "")
        if value is UNFIT or getattr(value, "__isabstractmethod__", False):
            if not is_family(cls, ignore=hints):
                raise UsageError(f"{cls.__name__}.{name} is missing: {permitted}")
        elif not computed and as_declared(value, hint) is not value:
            raise UsageError(f"{cls.__name__}.{name}={value!r}: {permitted}")


def is_family(cls: type, ignore: Collection[str] = ()) -> bool:
    """True if a class is only a base of others: abstract, or with a name that begins with ``_``.

    Args:
        ignore: abstract attributes to ignore.
    """
    abstract = (n for n in dir(cls) if getattr(getattr(cls, n, None), "__isabstractmethod__", False))
    return cls.__name__.startswith("_") or any(n not in ignore for n in abstract)


def number(name: str, value: Any, hint: Any, above: float) -> Any:
    """Check a number of a setting; None is permitted if the annotation allows it.

    Raises:
        UsageError: it is not a number, or not above ``above``.

    >>> number("window_batch", 4.0, int | None, 0)
    4
    """
    fitted = as_declared(value, hint)
    if fitted is UNFIT or (fitted is not None and not above < fitted < LARGEST):
        raise UsageError(f"{name}={value!r}: give {_words(hint)} above {above:g}")
    return fitted


LARGEST = 2**63
"""Exclusive upper limit of numbers, such as seeds."""


def as_declared(value: Any, hint: Any) -> Any:
    """Convert a value to the type of an annotation, or return `UNFIT`.

    >>> as_declared(8.0, int), as_declared("8", int) is UNFIT, as_declared([2, 3.0], int | Sequence[int])
    (8, True, [2, 3])
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        fitted = [f for h in inner if (f := as_declared(value, h)) is not UNFIT]
        return next((f for f in fitted if f is value), fitted[0] if fitted else UNFIT)
    if origin is Literal:
        return value if isinstance(value, (str, int, types.NoneType)) and value in inner else UNFIT
    if origin is Sequence:
        return _sequence(value, inner[0])
    if origin is Mapping:
        return value if isinstance(value, Mapping) else UNFIT
    if hint in (int, float, bool):
        return _number(value, hint)
    if hint is Tensor:
        return value if isinstance(value, (Tensor, np.ndarray)) else UNFIT
    if hint in (str, Path, types.NoneType):
        return value if isinstance(value, hint) else UNFIT
    return value


def _sequence(value: Any, inner: Any) -> Any:
    array = isinstance(value, (Tensor, np.ndarray))
    if isinstance(value, (str, bytes)) or (not value.ndim if array else not isinstance(value, Sequence)):
        return UNFIT
    if inner is Any:
        return value
    fitted = [as_declared(v, inner) for v in value]
    if any(f is UNFIT for f in fitted):
        return UNFIT
    if not array and all(f is v for f, v in zip(fitted, value)):
        return value
    return tuple(fitted) if isinstance(value, tuple) else fitted


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if kind is bool:
        return BOOLS.get(value, UNFIT) if isinstance(value, (bool, np.bool_, str)) else UNFIT
    if isinstance(value, (bool, np.bool_)):
        return UNFIT
    if not isinstance(value, Real) or math.isnan(value):
        return UNFIT
    if kind is float or isinstance(value, int):
        return value
    whole = float(value)
    return int(whole) if whole.is_integer() else UNFIT


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(h) for h in inner)
    if origin is Literal:
        return " or ".join(filter(None, (", ".join(map(repr, inner[:-1])), repr(inner[-1]))))
    if origin is Sequence:
        return f"a list of {SEVERAL[inner[0]]}" if inner[0] in SEVERAL else "a list"
    return "a mapping" if origin is Mapping else WORDS[hint]


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return the annotations of ``__init__`` and of the class; none of either if a name in them is undefined."""
    hints: dict[str, Any] = {}
    for annotated in (cls.__init__, cls):
        try:
            hints |= get_type_hints(annotated)
        except NameError:
            continue
    return hints
