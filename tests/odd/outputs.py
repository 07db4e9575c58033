"""Networks that return several tensors, or one of an unusual shape."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from torch import Tensor

from tests.odd.base import Around, Classifier, OddCase, Segmenter, image, logit, mask_sum, replaced, seeded

X = image(1, 12, 12)
Named = namedtuple("Named", ["logits", "features"])


@dataclass
class Result:
    """An output of a class of its own."""

    logits: Tensor


def other(y: Tensor) -> Tensor:
    """Something else of five numbers."""
    return torch.cat([y[:, :2], y], 1) * 0.3


def half(y: Tensor) -> Tensor:
    return F.avg_pool2d(y, 2)


def stacked(y: Tensor) -> Tensor:
    """Two heads on an axis of their own (B, heads, K, *spatial)."""
    return torch.stack([y, y.flip(1) * 2 + 1], 1)


def classifies(name: str, after: Callable[[Tensor], Any], **more: Any) -> OddCase:
    target = more.pop("target", "ClassScore(1)")
    score = more.pop("score", logit())
    more.setdefault("twin", replaced())
    make = lambda: seeded(lambda: Around(Classifier(), after=after))  # noqa: E731
    return OddCase(name, "outputs", make, X, score, target, layer="net.down", **more)


def segments(name: str, after: Callable[[Tensor], Any], channel: int = 0, **more: Any) -> OddCase:
    more.setdefault("twin", replaced())
    return OddCase(
        name, "outputs", lambda: seeded(lambda: Around(Segmenter(), after=after)), X, mask_sum(channel),
        f"MultiClassMask({channel})", layer="net.down", **more,
    )  # fmt: skip


def first(y: Tensor) -> Tensor:
    return y[:, :1]


CASES = [
    classifies("tuple, auxiliary first, chosen", lambda y: (other(y), y), options={"output": 1}),
    classifies("tuple, auxiliary first, not chosen", lambda y: (other(y), y), twin=None),
    classifies("tuple, features behind", lambda y: (y, other(y))),
    classifies("named tuple", lambda y: Named(y, other(y))),
    classifies("nested tuple", lambda y: ((y, other(y)), y.sum(1))),
    classifies("dictionary, chosen", lambda y: {"a": other(y), "b": y}, options={"output": "b"}),
    classifies("dictionary, not chosen", lambda y: {"a": other(y), "b": y}, twin=None, cause="output=KEY"),
    classifies("dictionary with 'out'", lambda y: OrderedDict(aux=other(y), out=y)),
    classifies("dictionary of lists", lambda y: {"boxes": [y], "labels": [y.argmax(1)]}, twin=None, cause="tensor"),
    classifies("list of dictionaries", lambda y: [{"boxes": v, "scores": v.sigmoid()} for v in y], twin=None,
               cause="tensor"),
    classifies("class of its own", Result, twin=None, cause="Result"),
    classifies("None beside the logits", lambda y: (None, y), options={"output": 1}),
    classifies("None first, not chosen", lambda y: (None, y)),
    classifies("MetaTensor", lambda y: MetaTensor(y)),
    classifies("complex numbers", lambda y: torch.complex(y, y), twin=None, cause="complex|dtype"),
    classifies("labels instead of logits", lambda y: y.argmax(1, keepdim=True), target="OutputValue(0)", score=logit(0),
               twin=replaced(after=lambda y: y.argmax(1, keepdim=True).to(y))),
    classifies("one number, (B,)", lambda y: y[:, 0], target="OutputValue(0)", score=logit(0),
               twin=replaced(after=first)),
    classifies("squeezed to ()", lambda y: y[:, :1].squeeze(), target="OutputValue(0)", score=logit(0),
               twin=replaced(after=first)),
    classifies("classes with empty axes (B, K, 1, 1)", lambda y: y[..., None, None]),
    classifies("classes over time (B, T, K)", lambda y: torch.stack([y, 2 * y.flip(1), -y], 1), twin=None),
    segments("deep supervision, finest first", lambda y: [y, half(y), half(half(y))]),
    segments("deep supervision, coarsest first", lambda y: [half(half(y)), half(y), y], twin=None),
    segments("deep supervision, coarsest first, chosen", lambda y: [half(half(y)), half(y), y],
             options={"output": 2}),
    segments("stacked heads (B, heads, K, h, w)", stacked),
    segments("output at half resolution", half, twin=replaced(after=half)),
]  # fmt: skip
