"""Networks whose output is, or is not, a probability, and heads whose channels are no ordinary classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.odd.base import Around, Classifier, OddCase, Score, Segmenter, image, logit, mask_sum, replaced, seeded

X = image(1, 12, 12)
After = Callable[[Tensor], Tensor]
# A softmax or a sign in the network, or in the score: their rules differ, and both are right.
DEEP_LIFT = ("DeepLift", "DeepLiftShap", "LayerDeepLift", "LayerDeepLiftShap")
SYNTHESIS = ("ClassImage", "DeepDream", "FeatureVisualization", "InvertedRepresentation")


def softmax(y: Tensor) -> Tensor:
    return y.softmax(1)


def above(channel: int, level: float, mask_of: Callable[[Tensor], Tensor] | None = None) -> Callable[[Tensor], Score]:
    """F is the sum of a channel over the voxels where it exceeds a level."""

    def freeze(prediction: Tensor) -> Score:
        mask = (prediction if mask_of is None else mask_of(prediction))[channel] > level
        assert bool(mask.any()), "nothing exceeds the level"
        return lambda y: (y[channel] * mask).sum()

    return freeze


def centred(classes: int, after: After | None, channel: int = 0) -> nn.Module:
    """Build a segmentation network with a logit of about zero in the mean over the image."""
    network = seeded(lambda: Around(Segmenter(classes), after=after))
    with torch.no_grad():
        network.net.head.bias -= network.net(X).mean((0, 2, 3))
    assert 0 < int((network.net(X)[0, channel] > 0).sum()) < 144
    return network


def segments(name: str, classes: int, after: After, score: Any, target: str, **more: Any) -> OddCase:
    """A segmentation network; the twin has the same output, unless another is given."""
    more.setdefault("twin", replaced(after=after))
    return OddCase(name, "heads", lambda: centred(classes, after), X, score, target, layer="net.down", **more)


def classifies(name: str, after: After | None, score: Any, target: str, bias: float = 0.0, **more: Any) -> OddCase:
    def make() -> nn.Module:
        network = seeded(lambda: Around(Classifier(), after=after))
        with torch.no_grad():
            network.net.head.bias += bias
        return network

    more.setdefault("twin", replaced(after=after))
    return OddCase(name, "heads", make, X, score, target, layer="net.down", **more)


class OfScore(nn.Module):
    """A network with the single output F, for a score that is a function of the output of ``net``.

    Args:
        net: the network.
        score: F of an output (K, *spatial).
    """

    def __init__(self, net: nn.Module, score: Score) -> None:
        super().__init__()
        self.net, self.score = net, score

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.score(y) for y in self.net(x)])[:, None]


def no_probability(name: str, after: After) -> OddCase:
    """A head in [0, 1] or above 0 that is no softmax: its probability is the softmax of it."""

    def twin(odd: nn.Module) -> nn.Module:
        with torch.no_grad():
            score = mask_sum(1, lambda y: y.softmax(0))(odd(X)[0])
        return OfScore(odd, score)

    return OddCase(
        name, "heads", lambda: centred(3, after), X, logit(0), "MultiClassMask(1, output='probability')", twin=twin,
        twin_target="OutputValue(0)", layer="net.down", parts=("net.net.down",),
        undefined=(*DEEP_LIFT, "ScoreCam", "ClassImage"),
    )  # fmt: skip


class EvalSoftmax(nn.Module):
    """Ends in softmax in evaluation mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Segmenter()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if self.training else self.net(x).softmax(1)


PROBABILITY = "MultiClassMask(1, output='probability')"
AS_IT_IS = "ThresholdMask(0.5, channel={}, value='raw')"
NAMES = {"class_names": {0: "benign", 1: "malignant"}}


def one_logit(y: Tensor) -> Tensor:
    return y[:, :1]


def negated(odd: nn.Module) -> nn.Module:
    """A network with the logit of the other class: the last weights have the other sign."""
    twin = Around(copy.deepcopy(odd.net), after=one_logit)
    with torch.no_grad():
        for p in twin.net.head.parameters():
            p.neg_()
    return twin


CASES = [
    segments("sigmoid inside, one channel", 1, torch.sigmoid, above(0, 0.5), "PredictedClasses",
             twin_target=AS_IT_IS.format(0)),
    segments("sigmoid inside, overlapping channels", 3, torch.sigmoid, above(1, 0.5),
             "MultiClassMask(1, activation='sigmoid')", twin_target=AS_IT_IS.format(1)),
    segments("sigmoid inside, threshold on probability", 1, torch.sigmoid, above(0, 0.5), "ThresholdMask(0.5)",
             twin_target=AS_IT_IS.format(0)),
    segments("mean of sigmoids", 1, lambda y: (y.sigmoid() + (2 * y).sigmoid()) / 2, above(0, 0.5), "MultiClassMask(0)",
             twin_target=AS_IT_IS.format(0)),
    segments("softmax inside", 3, softmax, mask_sum(), "MultiClassMask(1)"),
    segments("softmax inside, probability", 3, softmax, mask_sum(1, lambda y: y.softmax(0)), PROBABILITY,
             twin=replaced(), undefined=DEEP_LIFT),
    segments("softmax inside, threshold on probability", 3, softmax, above(1, 0.4),
             "ThresholdMask(0.4, channel=1, value='softmax')",
             twin_target="ThresholdMask(0.4, channel=1, value='raw')"),
    segments("softmax inside, log-probability", 3, softmax, mask_sum(1, lambda y: y.log_softmax(0)),
             "MultiClassMask(1, output='log_probability')", twin=replaced(), undefined=DEEP_LIFT),
    segments("log-softmax inside, probability", 3, lambda y: y.log_softmax(1), mask_sum(1, lambda y: y.softmax(0)),
             PROBABILITY, twin=replaced(), undefined=DEEP_LIFT),
    OddCase("softmax in evaluation mode only, probability", "heads", lambda: seeded(EvalSoftmax), X,
            mask_sum(0, lambda y: y.softmax(0)), "MultiClassMask(0, output='probability')", twin=replaced(),
            undefined=DEEP_LIFT, layer="net.down"),
    no_probability("ReLU head, probability", torch.relu),
    no_probability("clamped head, probability", lambda y: y.clamp(0, 1)),
    segments("logits between 0 and 1", 1, lambda y: 0.5 + 0.01 * y, above(0, 0.0), "MultiClassMask(0)",
             twin_target="ThresholdMask(0, channel=0, value='raw')"),
    classifies("regression between 0 and 1", lambda y: 0.5 + 0.01 * y, logit(0), "OutputValue(0)"),
    classifies("sigmoid inside, probability", torch.sigmoid, lambda p: lambda y: y[1].sigmoid(),
               "ClassScore(1, output='probability', activation='sigmoid')", twin=replaced(), undefined=DEEP_LIFT),
    classifies("softmax inside, probability, classifier", softmax, lambda p: lambda y: y.softmax(0)[1],
               "ClassScore(1, output='probability')", twin=replaced(), undefined=DEEP_LIFT),
    classifies("one logit, name of the positive class", one_logit, logit(0), "ClassScore('malignant')", options=NAMES,
               twin_target="ClassScore(0)"),
    classifies("one logit, name of the negative class", one_logit, logit(0), "ClassScore('benign')", options=NAMES,
               twin=negated, twin_target="ClassScore(0)", cause="negative start"),
    classifies("multi-label, a label by number", None, lambda p: lambda y: y[2].sigmoid(),
               "ClassScore(2, output='probability', activation='sigmoid')"),
    classifies("multi-label, no label is predicted", None, logit(), "PredictedClasses(activation='sigmoid')", -9.0,
               twin=None, undefined=SYNTHESIS),
]  # fmt: skip
