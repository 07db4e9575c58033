"""Checks of parameters against the annotations of their class: JSON, shells and notebooks pass values of any type."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.errors import UsageError

__all__ = ["as_declared", "check_stated", "device_named", "fit_parameters", "flag", "is_family", "number"]

UNFIT: Final = object()
"""The result of `as_declared` for a value of another type."""

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a file"}
WORDS |= {Tensor: "a tensor", types.NoneType: "None"}
BOOLS: dict[Any, bool] = {True: True, False: False, "true": True, "false": False}
"""Shells pass booleans as text; ``bool("false")`` would be True."""
SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}


def fit_parameters(owner: Any, names: Sequence[str]) -> None:
    """Check parameters against their annotations, in the class or in ``__init__``; whole floats become integers.

    Only numbers, texts, choices, files, tensors and sequences of them are checked; the class checks parameters of other
    types itself.

    Raises:
        UsageError: a value is of another type, a number is NaN, or ``__init__`` does not keep a parameter.
    """
    cls: Any = type(owner)
    hints: dict[str, Any] = _hints(cls)
    for name in names:
        if not hasattr(owner, name):
            raise UsageError(f"{cls.__name__}: __init__ must keep its parameter as self.{name}, for records and copies")
        value = getattr(owner, name)
        converted = as_declared(value, hints.get(name, Any))
        if converted is UNFIT:
            text = " ".join(repr(value).split())
            shown = text if len(text) <= 60 else f"{text[:57]}..."
            raise UsageError(f"{cls.__name__}: {name}={shown}: give {_words(hints[name])}")
        if converted is not value:
            setattr(owner, name, converted)


def check_stated(cls: type, hints: Mapping[str, Any]) -> None:
    """Check class attributes that every class must state, when the class is defined.

    A base class (see `is_family`) may omit them; the attributes that it sets are checked. A text may be a property.

    Raises:
        UsageError: one is missing or of another type; the message names class, attribute and permitted values.
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
    """Return True if a class is a base class only: it is abstract, or its name begins with ``_``.

    Args:
        cls: the class.
        ignore: abstract attributes that do not count.
    """
    abstract = (n for n in dir(cls) if getattr(getattr(cls, n, None), "__isabstractmethod__", False))
    return cls.__name__.startswith("_") or any(n not in ignore for n in abstract)


def number(name: str, value: Any, hint: Any, above: float) -> Any:
    """Check a number of a setting and convert it to its annotation; None where the annotation allows it.

    Raises:
        UsageError: it is no number, or not above ``above``.

    >>> number("window_batch", 4.0, int | None, 0)
    4
    """
    converted = as_declared(value, hint)
    if converted is UNFIT or (converted is not None and not above < converted < LARGEST):
        raise UsageError(f"{name}={value!r}: give {_words(hint)} above {above:g}")
    return converted


def device_named(name: str, value: Any) -> torch.device:
    """Return the device that a setting names.

    Raises:
        UsageError: torch has no such device.

    >>> device_named("device", "cpu")
    device(type='cpu')
    """
    try:
        return torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{name}={value!r}: no such device; write 'cpu', 'cuda' or 'cuda:1'") from error


def flag(name: str, value: Any) -> bool:
    """Return a boolean option; shells and configs pass booleans as text, and ``bool('false')`` would be True.

    Raises:
        UsageError: it is neither true nor false.

    >>> flag("amp", "false"), flag("amp", True), flag("amp", 0)
    (False, True, False)
    """
    known = {"true": True, "false": False, "1": True, "0": False}
    text = str(value).lower()
    if text not in known:
        raise UsageError(f"{name}={value!r}: give true or false")
    return known[text]


LARGEST = 2**63
"""Exclusive upper limit of numbers such as a seed."""


def as_declared(value: Any, hint: Any) -> Any:
    """Convert a value to the type of an annotation; return `UNFIT` if it has another type.

    >>> as_declared(8.0, int), as_declared("8", int) is UNFIT, as_declared([2, 3.0], int | Sequence[int])
    (8, True, [2, 3])
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        options = [f for h in inner if (f := as_declared(value, h)) is not UNFIT]
        return next((f for f in options if f is value), options[0] if options else UNFIT)
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
    items = [as_declared(v, inner) for v in value]
    if any(f is UNFIT for f in items):
        return UNFIT
    if not array and all(f is v for f, v in zip(items, value)):
        return value
    return tuple(items) if isinstance(value, tuple) else items


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
    """Return the annotations of ``__init__`` and of the class, except those with names undefined at run time."""
    hints: dict[str, Any] = {}
    for annotated in (cls.__init__, cls):
        try:
            hints |= get_type_hints(annotated)
        except NameError:
            continue
    return hints
