"""The head of a network: the meaning of its output, and the use that a bundle's postprocessing makes of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from monai.transforms import Activations, Activationsd, AsDiscrete, AsDiscreted, Compose, FlattenSubKeysd, SplitDimd
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.utils.choices import HEADS, HeadKind

__all__ = ["HEADS", "Declared", "Head", "HeadKind", "Postprocessing", "Values"]

Values = Literal["logit", "probability", "log_probability"]
Declared = Literal["probabilities", "logits", "regression"]


@dataclass(frozen=True)
class Postprocessing:
    """The use that a bundle makes of the output of its network.

    Attributes:
        activation: the function that it applies: ``"softmax"``, ``"sigmoid"``, ``"other"``; None: none.
        argmax: True if the class is the largest channel.
        thresholds: threshold of each channel after the activation (value >= threshold), or one for all; empty: none.
        keys: keys that the transforms activate, discretise or take from a dict, by which one of several outputs is
            chosen; the first one that is an output counts.
        declared: ``"probabilities"``, ``"logits"`` or ``"regression"`` where metadata.json states it.
    """

    activation: Literal["softmax", "sigmoid", "other"] | None = None
    argmax: bool = False
    thresholds: tuple[float, ...] = ()
    keys: tuple[str, ...] = ()
    declared: Declared | None = None

    @classmethod
    def of(
        cls,
        transforms: Any,
        key: str | None = None,
        declared: Declared | None = None,
    ) -> Postprocessing:
        """Read MONAI's transforms; others are not looked into.

        Args:
            transforms: a transform, a list of them, a `Compose`, or a `Postprocessing`, which is returned.
            key: key of the prediction; None: ``"pred"``, else the first one that the transforms activate or discretise.
                If they do so with an output that they take out of it (``FlattenSubKeysd``), that one.
            declared: see the attributes.

        >>> Postprocessing.of([Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.3)])
        Postprocessing(activation='sigmoid', argmax=False, thresholds=(0.3,), keys=('pred',), declared=None)
        """
        if isinstance(transforms, Postprocessing):
            return transforms
        steps = _flat(transforms)
        named = [str(k) for t in steps if isinstance(t, (Activationsd, AsDiscreted)) for k in t.keys]
        named = [k for k in named if k not in ("image", "label")]
        keys = list(dict.fromkeys([*named, *(str(k) for t in steps for k in getattr(t, "sub_keys", None) or ())]))
        channels: dict[str, int | None] = {}
        used = (*named, *(k for t in steps if isinstance(t, SplitDimd) for k in t.keys))
        if (key or "pred") in used:
            key = key or "pred"
        else:
            taken = [k for k in named if k in _taken(steps, key or "pred", named)]
            key = next(iter(taken), key or next(iter(named), None))
        if key is not None:
            channels[key] = None
        activation: Literal["softmax", "sigmoid", "other"] | None = None
        argmax, whole, each = False, (), {}  # type: bool, tuple[float, ...], dict[int, float]
        for step in steps:
            if isinstance(step, SplitDimd) and key in step.keys:
                postfixes = step.output_postfixes or range(64)
                channels |= {f"{key}_{postfix}": i for i, postfix in enumerate(postfixes)}
            for name, sigmoid, softmax, other in _activations(step):
                if (name is None or name in channels) and activation is None:
                    activation = "sigmoid" if sigmoid else "softmax" if softmax else "other" if other else None
            for name, largest, threshold in _decisions(step):
                if name is not None and name not in channels:
                    continue
                if largest:
                    argmax = True
                elif threshold is not None and not argmax:
                    values = tuple(float(t) for t in torch.as_tensor(threshold, dtype=torch.float64).flatten())
                    channel = None if name is None else channels[name]
                    if channel is None:
                        whole = values
                    else:
                        each[channel] = values[0]
        if each:
            whole = tuple(each.get(i, math.nan) for i in range(max(each) + 1))
        return cls(activation, argmax, () if argmax else whole, tuple(keys), declared)


@dataclass(frozen=True)
class Head:
    """The meaning of the output of a network.

    Attributes:
        kind: ``"softmax"``: raw output whose softmax over channels gives probabilities of exclusive classes;
            ``"sigmoid"``: raw output whose sigmoid gives the probability of the class of each channel;
            ``"softmax inside"``, ``"sigmoid inside"``: probabilities, because the network ends in this function;
            ``"log-softmax inside"``: log-probabilities; ``"raw"``: no scores of classes, as of a regression;
            ``"unknown"``: read like ``"softmax"`` (``"sigmoid"`` for one channel).
        certain: False if the kind is assumed or probable.
        evidence: why, one sentence each.
        postprocessing: the use that a bundle makes of the output.
    """

    kind: HeadKind = "unknown"
    certain: bool = False
    evidence: tuple[str, ...] = ()
    postprocessing: Postprocessing = Postprocessing()

    def __post_init__(self) -> None:
        if self.kind not in get_args(HeadKind):
            raise UsageError(f"head={self.kind!r}: give {', '.join(map(repr, HEADS))}, or None to find out")

    @property
    def values(self) -> Values:
        """The scale of the output; raw values of any kind are ``"logit"``."""
        inside: dict[str, Values] = {"log-softmax inside": "log_probability"}
        return inside.get(self.kind, "probability" if self.kind.endswith("inside") else "logit")

    @property
    def inside(self) -> bool:
        """True if the network itself ends in softmax, log-softmax or sigmoid."""
        return self.values != "logit"

    def activation(self, wanted: str, channels: int) -> Literal["softmax", "sigmoid"]:
        """Return the function that relates the channels' values to probabilities.

        Args:
            wanted: the target's ``activation``; ``"auto"``: that of the head.
            channels: number of channels K.
        """
        if wanted in ("softmax", "sigmoid"):
            return "softmax" if wanted == "softmax" else "sigmoid"
        if self.kind == "unknown" or self.kind == "raw":
            return "sigmoid" if channels == 1 else "softmax"
        return "sigmoid" if self.kind.startswith("sigmoid") or (channels == 1 and not self.inside) else "softmax"

    def exclusive(self, wanted: str, channels: int) -> bool:
        """Return True if a voxel belongs to the class of the largest channel, False if to every one above its
        threshold; arguments as for `activation`."""
        if channels == 1:
            return False
        if wanted == "auto" and (self.postprocessing.argmax or self.postprocessing.thresholds):
            return self.postprocessing.argmax
        return self.activation(wanted, channels) == "softmax"

    def threshold(self, channel: int) -> float | None:
        """Return the bundle's threshold of a channel; None: it has none."""
        given = self.postprocessing.thresholds
        value = given[0] if len(given) == 1 else given[channel] if channel < len(given) else math.nan
        return None if math.isnan(value) else value

    def above(self, prediction: Tensor, channel: int) -> Tensor:
        """Return where a channel is predicted, bool (*spatial): probability > 0.5, or the bundle's threshold.

        Args:
            prediction: (K, *spatial), or (K,).
            channel: the channel.
        """
        output, threshold = prediction[channel], self.threshold(channel)
        if threshold is None:
            return output > {"logit": 0.0, "probability": 0.5, "log_probability": math.log(0.5)}[self.values]
        applied = None if self.inside else self.postprocessing.activation
        if applied == "sigmoid":
            output = torch.sigmoid(output)
        elif applied == "softmax":
            output = torch.softmax(prediction, 0)[channel]
        elif self.values == "log_probability":
            output = output.exp()
        return output >= threshold

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a record: kind, evidence, certain."""
        return {"kind": self.kind, "evidence": list(self.evidence), "certain": self.certain}


def _taken(steps: Iterable[Any], key: str, named: Iterable[str]) -> list[str]:
    """Return the keys of the outputs that transforms take out of a prediction with several."""
    keys: list[str] = []
    for step in steps:
        if isinstance(step, FlattenSubKeysd) and key in step.keys:
            subkeys: Any = step.sub_keys
            prefix = f"{step.prefix}_" if step.prefix else ""
            keys += named if subkeys is None else [f"{prefix}{k}" for k in subkeys]
    return keys


def _flat(transforms: Any) -> list[Any]:
    if transforms is None:
        return []
    if isinstance(transforms, Compose):
        return list(transforms.flatten().transforms)
    return [s for t in transforms for s in _flat(t)] if isinstance(transforms, (list, tuple)) else [transforms]


def _activations(step: Any) -> Iterable[tuple[str | None, bool, bool, Any]]:
    if isinstance(step, Activationsd):
        return [(str(k), *values) for k, *values in zip(step.keys, step.sigmoid, step.softmax, step.other)]
    return [(None, step.sigmoid, step.softmax, step.other)] if isinstance(step, Activations) else []


def _decisions(step: Any) -> Iterable[tuple[str | None, bool, Any]]:
    if isinstance(step, AsDiscreted):
        return [(str(k), bool(a), t) for k, a, t in zip(step.keys, step.argmax, step.threshold)]
    return [(None, step.argmax, step.threshold)] if isinstance(step, AsDiscrete) else []
