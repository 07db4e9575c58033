"""The meaning of an output is detected where the operation or three ranges show it, and not otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.engine.checks import head as checks
from esegeta_monai.engine.checks.base import Sample
from esegeta_monai.engine.checks.head import HeadEvidence, evidence_of, find_head, may_be_inside
from esegeta_monai.engine.head import Head, Postprocessing
from esegeta_monai.engine.network.model import Model
from esegeta_monai.errors import NetworkError, UsageError


class Ends(nn.Module):
    """A convolution and a last step."""

    def __init__(self, last, channels: int = 3, bias: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.c = nn.Conv2d(1, channels, 3, padding=1)
        with torch.no_grad():
            self.c.bias.add_(bias)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.c(x))


class EvalOnly(Ends):
    """Softmax in evaluation mode, as DINTS and others do."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return y if self.training else torch.softmax(y, 1)


class Hidden(torch.autograd.Function):
    """A function whose name autograd does not tell."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g


def sample(network: nn.Module, seed: int = 0) -> Sample:
    x = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    return Sample(Model(network.eval(), torch.device("cpu")), x)


def decided(network: nn.Module, post: Postprocessing | None = None, stated: str | None = None):
    at = sample(network)
    with torch.no_grad():
        prediction = at.run(at.window)[0]
    return find_head(prediction, stated, post or Postprocessing(), lambda: evidence_of(at))


def softmax_then(step):
    return lambda y: step(torch.softmax(y, 1))


INSIDE = {
    "softmax": (Ends(lambda y: torch.softmax(y, 1)), "softmax inside"),
    "module": (Ends(nn.Softmax(1)), "softmax inside"),
    "eval only": (EvalOnly(None), "softmax inside"),
    "view": (Ends(softmax_then(lambda p: p.flatten(2).reshape(p.shape).permute(0, 1, 3, 2))), "softmax inside"),
    "slice": (Ends(softmax_then(lambda p: p[:, 1:])), "softmax inside"),
    "one channel of two": (Ends(softmax_then(lambda p: p[:, 1:]), 2), "sigmoid inside"),
    "concatenation": (Ends(softmax_then(lambda p: torch.cat([p[:, 2:], p[:, :2]], 1))), "softmax inside"),
    "resized": (Ends(softmax_then(lambda p: F.interpolate(p, scale_factor=2, mode="bilinear"))), "softmax inside"),
    "channels last": (Ends(lambda y: y.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2)), "softmax inside"),
    "mean of softmax": (Ends(lambda y: (torch.softmax(y, 1) + torch.softmax(2 * y, 1)) / 2), "softmax inside"),
    "by hand": (Ends(lambda y: y.exp() / y.exp().sum(1, keepdim=True)), "softmax inside"),
    "log-softmax": (Ends(lambda y: torch.log_softmax(y, 1)), "log-softmax inside"),
    "log-softmax by hand": (Ends(lambda y: y - y.logsumexp(1, keepdim=True)), "log-softmax inside"),
    "sigmoid": (Ends(torch.sigmoid), "sigmoid inside"),
    "sigmoid, one channel": (Ends(nn.Sigmoid(), 1), "sigmoid inside"),
    "sigmoid and views": (Ends(lambda y: torch.sigmoid(y).flatten(2)[..., :50].unsqueeze(-1)), "sigmoid inside"),
}


@pytest.mark.parametrize("name", INSIDE)
def test_an_activation_inside_is_seen(name):
    network, kind = INSIDE[name]
    head, result = decided(network)
    assert (head.kind, head.certain, result.verdict) == (kind, True, "handled"), result.text


NOT_INSIDE = {
    "linear": Ends(nn.Identity()),
    "logits in 0 to 1": Ends(lambda y: 0.01 * y, bias=50.0),
    "ReLU": Ends(torch.relu),
    "small ReLU": Ends(lambda y: torch.relu(0.01 * y)),
    "clamp": Ends(lambda y: y.clamp(0, 1)),
    "hardtanh": Ends(nn.Hardtanh(0, 1)),
    "regression in 0 to 1": nn.Sequential(Ends(torch.relu), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)),
    "two logits that sum to 1 on zero": Ends(lambda y: torch.stack([y[:, 0], 1 - y[:, 0]], 1), 1, bias=0.5),
    "softmax over space": Ends(lambda y: y.flatten(2).softmax(2).reshape(y.shape) * 3),
    "sigmoid gate": Ends(lambda y: y * torch.sigmoid(y)),
    "mixed": Ends(lambda y: torch.cat([torch.sigmoid(y), y], 1)),
}


@pytest.mark.parametrize("name", NOT_INSIDE)
def test_other_outputs_are_not_taken_for_it(name):
    network = NOT_INSIDE[name]
    if name == "regression in 0 to 1":
        with torch.no_grad():
            network[-1].weight.fill_(0.1)
            network[-1].bias.fill_(0.4)
    head, result = decided(network)
    assert not head.inside, result.text
    if name not in ("softmax over space",):
        assert result.verdict == "passed", result.text


def test_the_prediction_alone_may_look_like_probabilities():
    """These are the cases for which the operations and three inputs are needed."""
    for name in ("logits in 0 to 1", "small ReLU", "clamp", "regression in 0 to 1"):
        at = sample(NOT_INSIDE[name])
        assert may_be_inside(at.run(at.window)[0])
    at = sample(NOT_INSIDE["linear"])
    assert not may_be_inside(at.run(at.window)[0])


MEAN = Ends(lambda y: (torch.sigmoid(y) + torch.sigmoid(y - 1) + torch.sigmoid(2 * y)) / 3)


@pytest.mark.parametrize("network", [MEAN, Ends(Hidden.apply), Ends(nn.Hardsigmoid())], ids=["mean", "hidden", "hard"])
def test_range_alone_is_probable_and_needs_postprocessing_that_agrees(network):
    head, result = decided(network)
    assert (head.kind, result.verdict) == ("unknown", "warned")
    assert "confirm by head='sigmoid inside'" in result.text
    head, result = decided(network, Postprocessing(thresholds=(0.5,)))
    assert (head.kind, head.certain, result.verdict) == ("sigmoid inside", False, "handled")
    assert "probably" in result.text
    head, result = decided(network, Postprocessing(activation="sigmoid", thresholds=(0.5,)))
    assert (head.kind, result.verdict) == ("sigmoid", "warned")
    head, result = decided(network, stated="sigmoid inside")
    assert (head.kind, head.certain, result.verdict) == ("sigmoid inside", True, "passed")


@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
def test_a_second_activation_is_refused_unless_confirmed(function):
    network = Ends(lambda y: torch.softmax(y, 1) if function == "softmax" else torch.sigmoid(y))
    post = Postprocessing(activation=function, argmax=function == "softmax")
    with pytest.raises(NetworkError, match="squashed twice"):
        decided(network, post)
    assert decided(network, post, f"{function} inside")[0].values == "probability"
    assert decided(network, post, function)[0].values == "logit"
    assert decided(Ends(nn.Identity()), post)[0] == Head(
        function, True, decided(Ends(nn.Identity()), post)[0].evidence, post
    )


def test_what_the_user_states_must_fit_the_prediction():
    with pytest.raises(UsageError, match="the output has values from"):
        decided(Ends(nn.Identity()), stated="sigmoid inside")
    with pytest.raises(UsageError, match="log-probability"):
        decided(Ends(torch.sigmoid), stated="log-softmax inside")


def test_outputs_that_are_none_of_these_are_unknown():
    for last, name in ((nn.Softplus(), "Softplus"), (F.logsigmoid, "LogSigmoid")):
        head, result = decided(Ends(lambda y, last=last: last(y - 3)))
        assert (head.kind, result.verdict) == ("unknown", "warned")
        assert name in result.text
    head, result = decided(Ends(nn.Identity()), Postprocessing(activation="other"))
    assert (head.kind, result.verdict) == ("unknown", "warned")


def test_postprocessing_decides_on_raw_output():
    raw = Ends(nn.Identity())
    assert decided(raw, Postprocessing(argmax=True))[0].kind == "softmax"
    assert decided(raw, Postprocessing(activation="sigmoid"))[0].kind == "sigmoid"
    assert decided(raw, Postprocessing(declared="regression"))[0].kind == "raw"
    assert decided(raw)[0].kind == "softmax"
    assert decided(Ends(nn.Identity(), 1))[0].kind == "sigmoid"
    assert not decided(raw)[0].certain


def test_it_is_measured_once_per_network_and_weights(monkeypatch):
    network, calls = Ends(torch.sigmoid), []
    monkeypatch.setattr(checks, "_measured", lambda at: calls.append(1) or HeadEvidence())
    for _ in range(3):
        evidence_of(sample(network))
    assert len(calls) == 1
    with torch.no_grad():
        network.c.bias.add_(1)
    evidence_of(sample(network))
    assert len(calls) == 2


def test_it_leaves_the_random_state_and_costs_three_passes():
    network = Ends(torch.sigmoid)
    at, before = sample(network), torch.get_rng_state()
    seen = []
    handle = network.register_forward_hook(lambda *a: seen.append(1))
    evidence_of(at)
    handle.remove()
    assert len(seen) == 3
    assert torch.equal(torch.get_rng_state(), before)
