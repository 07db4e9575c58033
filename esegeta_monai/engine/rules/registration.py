"""Registration of rules and operations from outside the package."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

import torch

from esegeta_monai.engine.rules.composites import FIRST_ONLY, RULES
from esegeta_monai.engine.rules.kinds import CUTS, INERT, KINDS, Kind
from esegeta_monai.engine.rules.mode import OPERATION_RULES, Family, Rule
from esegeta_monai.engine.rules.operations import canonical_name
from esegeta_monai.errors import UsageError

__all__ = ["register_operation", "register_rule"]

R = TypeVar("R", bound=type[Rule])
REGISTRABLE = (Kind.MOVE, Kind.LINEAR, Kind.ACTIVATION, Kind.UNIVARIATE, Kind.PRODUCT)
"""Kinds whose rules need only the function of an operation."""


def register_rule(cls: R, *, first_only: bool = False) -> R:
    """Add a relevance rule for operations with weights, under its class name, for use in LRP composites.

    `esegeta_monai.methods.LRP` then accepts the name: ``LRP(composite={"convolution": "Mine", "dense": "Epsilon"})``. A
    class of the same module and name is replaced, so that a script can be run again.

    Args:
        cls: a dataclass whose fields are the rule's parameters, with the method of `esegeta_monai.engine.rules.Rule`.
        first_only: True: the rule applies to the first layer only, because it returns relevance that no multiplier of
            the input can express.

    Returns:
        ``cls``, so that the function can be used as a decorator.

    Raises:
        UsageError: ``cls`` is no dataclass or lacks the method, or another rule has its name.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UsageError(f"{cls!r}: give the class of a rule, a dataclass whose fields are its parameters")
    _check_backward(cls.__name__, getattr(cls, "backward", None), bound=False)
    known = RULES.get(cls.__name__)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise UsageError(f"the rule name {cls.__name__!r} is taken by {known.__module__}.{known.__qualname__}")
    RULES[cls.__name__] = cls
    if first_only:
        FIRST_ONLY.add(cls.__name__)
    else:
        FIRST_ONLY.discard(cls.__name__)
    return cls


def register_operation(function: Callable[..., Any], kind: Kind, **rules: Rule) -> None:
    """Add an operation that the engine does not know, so that rule-based methods run on networks that call it.

    The kind determines the rule of every method: an elementwise function (`Kind.UNIVARIATE`) has the quotient Δg / Δx
    in DeepLIFT, (g(x) − g(0)) / x in LRP, and its derivative in guided backpropagation. Operations of the engine keep
    their rules, so that equal methods and parameters give equal maps.

    Args:
        function: a torch function or a method of `torch.Tensor`; covers the function, the method and the in-place form.
        kind: MOVE, LINEAR, ACTIVATION, UNIVARIATE or PRODUCT. ACTIVATION: guided backpropagation and deconvolution act
            on it. LINEAR: without a constant term.
        rules: rules that replace those of the kind, by `esegeta_monai.engine.rules.Family`.

    Raises:
        UsageError: no torch function, a known one, another kind, an unknown family, or no rule.

    >>> register_operation(torch.i0, Kind.UNIVARIATE)
    """
    name = canonical_name(function)[0] if callable(function) else ""
    if not callable(function) or function not in torch.overrides.get_testing_overrides():
        raise UsageError(f"{function!r}: give a torch function or a method of torch.Tensor")
    if kind not in REGISTRABLE:
        raise UsageError(f"kind={kind!r}: give Kind.{', '.join(k.name for k in REGISTRABLE)}")
    given = REGISTERED.get(name)
    if name in INERT or name in CUTS or (name in KINDS and given is None):
        raise UsageError(f"the operation {name!r} is known to the engine and keeps its rules")
    unknown = set(rules) - set(get_args(Family))
    if unknown:
        raise UsageError(f"no rules are called {', '.join(sorted(unknown))}: give {', '.join(get_args(Family))}")
    for family, rule in rules.items():
        if isinstance(rule, type):
            raise UsageError(f"{family}={rule.__name__}: give an instance of the rule, {rule.__name__}(…)")
        _check_backward(type(rule).__name__, getattr(rule, "backward", None), bound=True)
    described = kind, {family: type(rule).__qualname__ for family, rule in rules.items()}
    if given is not None and given != described:
        raise UsageError(f"the operation {name!r} has been registered with another kind or other rules")
    REGISTERED[name], KINDS[name] = described, kind
    OPERATION_RULES.update({(family, name): rule for family, rule in rules.items()})


REGISTERED: dict[str, tuple[Kind, dict[str, str]]] = {}
"""Registered operations: kind and the classes of their rules, by name."""


def _check_backward(owner: str, backward: Any, *, bound: bool) -> None:
    if callable(backward):
        try:
            inspect.signature(backward).bind(*([] if bound else [None]), None, (), None)
            return
        except TypeError:
            pass
    raise UsageError(f"{owner} is no rule: it needs a method backward(self, operation, operands, gradient)")
