"""Composites: the rules of operations with weights by kind and position, declared as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import Rule
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.weighted import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from esegeta_monai.errors import UsageError

__all__ = ["COMPOSITES", "RULES", "Composite", "composite_of"]

#: The rules by name; their fields are their parameters. `esegeta_monai.engine.rules.register_rule` adds to them.
RULES: dict[str, Callable[..., Rule]] = {
    "Epsilon": Epsilon,
    "Gamma": Gamma,
    "ZPlus": ZPlus,
    "AlphaBeta": AlphaBeta,
    "Flat": Flat,
    "WSquare": WSquare,
    "ZBox": ZBox,
}
#: Rules that apply to the first layer only.
FIRST_ONLY = {"Flat", "WSquare", "ZBox"}

#: The composites by name, written as a user would.
COMPOSITES: Mapping[str, Mapping[str, object]] = {
    "EpsilonPlus": {"convolution": "ZPlus", "dense": "Epsilon"},
    "EpsilonPlusFlat": {"convolution": "ZPlus", "dense": "Epsilon", "first": "Flat"},
    "EpsilonGammaBox": {"convolution": "Gamma", "dense": "Epsilon", "first": "ZBox"},
    "EpsilonAlpha2Beta1": {
        "convolution": {"rule": "AlphaBeta", "alpha": 2.0, "beta": 1.0},
        "dense": "Epsilon",
    },
    "DeepTaylor": {"convolution": "ZPlus", "dense": "ZPlus", "first": "WSquare"},
    "Epsilon": {"convolution": "Epsilon", "dense": "Epsilon"},
    "LRP0": {
        "convolution": {"rule": "Epsilon", "epsilon": 0.0},
        "dense": {"rule": "Epsilon", "epsilon": 0.0},
    },
}


@dataclass(frozen=True)
class Composite:
    """A rule for convolutions, one for linear layers, and optionally one for those of them that read the input."""

    convolution: Rule
    dense: Rule
    first: Rule | None = None

    def rule(self, operation: Operation) -> Rule:
        """Return the rule of an operation with weights."""
        if operation.reads_input and self.first is not None:
            return self.first
        return self.convolution if operation.kind is Kind.CONVOLUTION else self.dense


def composite_of(
    spec: str | Mapping[str, object] | Composite,
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    low: float | Tensor = 0.0,
    high: float | Tensor = 1.0,
) -> Composite:
    """Return the composite of a name or a mapping; the parameters are defaults for rules that do not set them.

    Raises:
        UsageError: unknown composite, rule or parameter, or a rule in a position where it cannot be used.

    >>> composite_of("EpsilonPlusFlat").first
    Flat()
    >>> composite_of({"convolution": {"rule": "Gamma", "gamma": 0.1}, "dense": "Epsilon"}).convolution
    Gamma(gamma=0.1)
    """
    if isinstance(spec, Composite):
        return spec
    if isinstance(spec, str):
        if spec not in COMPOSITES:
            raise UsageError(f"unknown composite {spec!r}; there are {', '.join(COMPOSITES)}")
        spec = COMPOSITES[spec]
    unknown = set(spec) - {"convolution", "dense", "first"}
    if unknown or not {"convolution", "dense"} <= set(spec):
        raise UsageError(f"a composite has 'convolution', 'dense' and optionally 'first'; given {sorted(spec)}")
    defaults: dict[str, object] = {"epsilon": epsilon, "gamma": gamma, "low": low, "high": high}
    rules = {place: None if rule is None else _rule_of(rule, place, defaults) for place, rule in spec.items()}
    return Composite(**rules)  # type: ignore[arg-type]


def _rule_of(spec: object, place: str, defaults: Mapping[str, object]) -> Rule:
    given: dict[str, object] = dict(spec) if isinstance(spec, Mapping) else {"rule": spec}
    name = given.pop("rule", None)
    if not isinstance(name, str) or name not in RULES:
        raise UsageError(f"unknown rule {name!r} for {place}; there are {', '.join(RULES)}")
    if name in FIRST_ONLY and place != "first":
        raise UsageError(f"{name} returns relevance, not multipliers; use it as the rule for 'first' only")
    fields = {field.name for field in dataclasses.fields(RULES[name])}  # type: ignore[arg-type]
    if not set(given) <= fields:
        raise UsageError(f"rule {name} has the parameters {sorted(fields)}; given {sorted(given)}")
    filled = {key: value for key, value in defaults.items() if key in fields}
    return RULES[name](**{**filled, **given})
