"""Rules and operations from outside the package."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from esegeta_monai.engine.rules import (
    PLAIN,
    RULES,
    Kind,
    Part,
    Run,
    composite_of,
    deconvolution,
    deep_lift,
    distribute_shares,
    excitation,
    guided,
    lrp,
    register_operation,
    register_rule,
    registration,
)
from esegeta_monai.engine.rules.composites import FIRST_ONLY
from esegeta_monai.engine.rules.kinds import KINDS
from esegeta_monai.engine.rules.mode import OPERATION_RULES
from esegeta_monai.errors import RuleError, UsageError
from esegeta_monai.methods import LRP


@pytest.fixture(autouse=True)
def _nothing_stays():
    """Rules and operations that a test registers are gone after it."""
    tables = (KINDS, OPERATION_RULES, RULES, registration.REGISTERED)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before):
        table.clear()
        table.update(kept)
    FIRST_ONLY.discard("Absolute")


@dataclass(frozen=True)
class Absolute:
    """R_i = Σ_j |x_i w_ij| / Σ_i |x_i w_ij| R_j."""

    power: float = 1.0

    def backward(self, operation, operands, gradient):
        (x,) = operands
        part = Part(x.abs(), operation.argument("weight").abs())
        (share,) = distribute_shares(operation, [part], gradient * operation.function(x), None)
        return (x.sign() * share,)


class Sinc(nn.Module):
    """y = Σ_v w sinc(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2).double()

    def forward(self, x):
        return self.linear(torch.sinc(x))


@pytest.fixture
def case():
    torch.manual_seed(0)
    network, x = Sinc().eval(), torch.randn(3, 6, dtype=torch.float64)
    cotangents = torch.zeros(1, 3, 2, dtype=torch.float64)
    cotangents[..., 1] = 1
    return network, x, cotangents


def test_a_registered_rule_is_a_word_of_composites():
    assert register_rule(Absolute) is Absolute
    chosen = composite_of({"convolution": {"rule": "Absolute", "power": 2.0}, "dense": "Absolute"})
    assert (chosen.convolution, chosen.dense) == (Absolute(2.0), Absolute())
    assert (
        LRP(composite={"convolution": "Absolute", "dense": "Absolute"}).parameters["composite"]["dense"] == "Absolute"
    )
    layer, x = nn.Linear(6, 1, bias=False).double(), torch.randn(4, 6, dtype=torch.float64)
    relevance = lrp(
        layer, x, torch.ones(1, 4, 1, dtype=torch.float64), {"convolution": "Absolute", "dense": "Absolute"}
    )
    shares = (x * layer.weight).abs()
    expected = (shares / shares.sum(1, keepdim=True) * layer(x)).detach()
    assert (relevance.input[0] - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_rule_for_the_first_layer_only_is_refused_elsewhere():
    register_rule(Absolute, first_only=True)
    with pytest.raises(UsageError, match="Absolute returns relevance, not multipliers"):
        composite_of({"convolution": "Absolute", "dense": "Epsilon"})
    assert composite_of({"convolution": "ZPlus", "dense": "Epsilon", "first": "Absolute"}).first == Absolute()


def _no_dataclass():
    return type("Other", (), {"backward": Absolute.backward})


def _too_few():
    return dataclasses.make_dataclass("Other", [], namespace={"backward": lambda self, gradient: (gradient,)})


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (_no_dataclass(), "give the class of a rule, a dataclass"),
        (Absolute(), "give the class of a rule, a dataclass"),
        (_too_few(), r"Other is no rule: it needs a method backward\(self, operation, operands, gradient\)"),
        (dataclasses.make_dataclass("Other", []), "Other is no rule"),
        (dataclasses.make_dataclass("Gamma", [], namespace={"backward": Absolute.backward}), "'Gamma' is taken by"),
    ],
)
def test_what_is_no_rule_is_refused(cls, message):
    with pytest.raises(UsageError, match=message):
        register_rule(cls)


def test_an_unknown_operation_raises_until_it_is_registered(case):
    network, x, cotangents = case
    for rule in (lrp, deep_lift):
        with pytest.raises(RuleError, match="operation 'sinc' in Sinc: no rule is known for it"):
            rule(network, x, *([torch.ones_like(x)] if rule is deep_lift else []), cotangents)
    register_operation(torch.sinc, Kind.UNIVARIATE)
    weight, bias = network.linear.weight[1].detach(), network.linear.bias[1].detach()
    reference = torch.ones_like(x) / 3
    attribution = deep_lift(network, x, reference, cotangents).input[0]
    expected = weight * (torch.sinc(x) - torch.sinc(reference)) / (x - reference) * (x - reference)
    assert (attribution - expected).abs().max() <= 1e-10 * expected.abs().max()
    relevance = lrp(
        network,
        x,
        cotangents,
        {"convolution": {"rule": "Epsilon", "epsilon": 0.0}, "dense": {"rule": "Epsilon", "epsilon": 0.0}},
    )
    expected = weight * (torch.sinc(x) - 1)  # sinc(0) = 1 is absorbed, and so is the bias
    assert (relevance.input[0] - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (relevance.absorbed[0] - weight.sum() - bias).abs().max() <= 1e-10


def test_every_spelling_of_the_operation_is_meant(case):
    _, x, cotangents = case
    register_operation(torch.sinc, Kind.UNIVARIATE)

    class InPlace(Sinc):
        def forward(self, x):
            return self.linear(x.clone().sinc_())

    network = InPlace().eval()
    other = Sinc().eval()
    other.load_state_dict(network.state_dict())
    assert torch.equal(lrp(network, x, cotangents).input, lrp(other, x, cotangents).input)


class Twice:
    """Twice what arrives."""

    def backward(self, operation, operands, gradient):
        return (2 * gradient,)


@pytest.mark.parametrize("family", ["guided", "deconvolution", "lrp", "deep_lift", "excitation"])
def test_a_family_s_own_rule_is_used_by_that_family_alone(case, family):
    network, x, cotangents = case
    register_operation(torch.sinc, Kind.ACTIVATION, **{family: Twice()})
    weight = network.linear.weight[1].detach()
    asked: list[str] = []

    class Asked(Twice):
        def backward(self, operation, operands, gradient):
            asked.append(operation.name)
            return super().backward(operation, operands, gradient)

    OPERATION_RULES[family, "sinc"] = Asked()
    reference = torch.zeros_like(x)
    runs = {
        "guided": lambda: guided(network, x, cotangents),
        "deconvolution": lambda: deconvolution(network, x, cotangents),
        "lrp": lambda: lrp(network, x, cotangents),
        "deep_lift": lambda: deep_lift(network, x, reference, cotangents),
        "excitation": lambda: excitation(network, x, cotangents),
    }
    for name, run in runs.items():
        result = run().input[0]
        if name in ("guided", "deconvolution") and name == family:
            assert (result - 2 * weight).abs().max() <= 1e-12
    assert set(asked) == {"sinc"}
    assert len(asked) == (len(x) if family == "lrp" else 1)  # LRP runs window by window


def test_a_method_runs_the_network_under_rules_of_its_own():
    """One that passes on twice the gradient at each rectifier, whatever its sign."""

    class Rules:
        family = "mine"

        def treatment(self, operation):
            return Twice() if operation.kind is Kind.ACTIVATION else PLAIN

    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)).double().eval()
    x, cotangents = torch.randn(3, 6, dtype=torch.float64), torch.ones(1, 3, 2, dtype=torch.float64)
    run = Run(network, x, Rules())
    ((gradient, _, _),) = run.backward(cotangents)
    expected = (2 * torch.ones(2, dtype=torch.float64) @ network[2].weight @ network[0].weight).expand(3, 6)
    assert (gradient - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert torch.equal(run.output, network(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.relu, Kind.ACTIVATION), "'relu' is known to the engine and keeps its rules"),
        ((torch.argmax, Kind.MOVE), "'argmax' is known"),
        ((torch.sinc, Kind.NORM), "give Kind.MOVE, LINEAR, ACTIVATION, UNIVARIATE, PRODUCT"),
        ((torch.sinc, "univariate"), "give Kind.MOVE"),
        ((len, Kind.UNIVARIATE), "give a torch function"),
        (("sinc", Kind.UNIVARIATE), "give a torch function"),
    ],
)
def test_what_cannot_be_registered_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        register_operation(*arguments)


def test_rules_of_an_operation_are_checked():
    with pytest.raises(UsageError, match="no rules are called lpr: give guided, deconvolution, lrp, deep_lift"):
        register_operation(torch.sinc, Kind.UNIVARIATE, lpr=Twice())
    with pytest.raises(UsageError, match=r"lrp=Twice: give an instance of the rule, Twice\(…\)"):
        register_operation(torch.sinc, Kind.UNIVARIATE, lrp=Twice)
    with pytest.raises(UsageError, match="object is no rule"):
        register_operation(torch.sinc, Kind.UNIVARIATE, lrp=object())
    assert "sinc" not in KINDS
    register_operation(torch.sinc, Kind.UNIVARIATE, lrp=Twice())
    register_operation(torch.sinc, Kind.UNIVARIATE, lrp=Twice())  # a script that runs again
    with pytest.raises(UsageError, match="'sinc' has been registered with another kind or other rules"):
        register_operation(torch.sinc, Kind.UNIVARIATE)
