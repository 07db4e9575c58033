"""Read from a MONAI postprocessing how an ensemble of networks is averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.transforms import (
    Activationsd,
    CastToTyped,
    Compose,
    EnsureTyped,
    Invertd,
    MapTransform,
    MeanEnsembled,
    SaveImaged,
    ToDeviced,
    VoteEnsembled,
)
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.explain.ensemble import Average

__all__ = ["MeanOfMembers", "read_mean"]

_COMMUTE = (EnsureTyped, ToDeviced, CastToTyped, Invertd, SaveImaged)
"""Transforms before the mean that change type, device or grid alike for all members, or write files."""


@dataclass(frozen=True)
class MeanOfMembers:
    """How a postprocessing averages the predictions of the members.

    Attributes:
        average: what is averaged, see `esegeta_monai.explain.EnsembleInferer`.
        weights: weight of each member; they sum to 1.
        key: key of the mean.
        after: the transforms after the mean.
    """

    average: Average
    weights: tuple[float, ...]
    key: str
    after: tuple[Any, ...]

    def of(self, predictions: Sequence[Tensor]) -> Tensor:
        """Return the prediction (B, K, *spatial) of the ensemble from raw ones of its members, in their order.

        Where probabilities are averaged, the members stay apart: (B, M·K, *spatial).
        """
        if self.average != "output":
            return torch.cat(list(predictions), 1)
        return sum(w * p for w, p in zip(self.weights[1:], predictions[1:])) + self.weights[0] * predictions[0]


def read_mean(transforms: Any, keys: Sequence[str]) -> MeanOfMembers:
    """Return how the transforms average the predictions under ``keys``, one per member.

    Args:
        transforms: a list of dictionary transforms, or a `Compose`.
        keys: keys of the members' predictions, such as ``pred_0``, ``pred_1``.

    Raises:
        UsageError: they vote, average by class, average nothing, or change a prediction before the mean in a way that
            a target does not follow; the message names the way out.

    >>> steps = [Activationsd(["a", "b"], softmax=True), MeanEnsembled(["a", "b"], output_key="pred")]
    >>> read_mean(steps, ["a", "b"]).average
    'softmax'
    """
    steps = list(Compose(transforms).flatten().transforms)
    average: Average = "output"
    for number, step in enumerate(steps):
        own = [k for k in map(str, step.keys) if k in keys] if isinstance(step, MapTransform) else []
        if isinstance(step, VoteEnsembled) and own:
            raise UsageError(
                "VoteEnsembled counts labels, which has no derivative and jumps between whole numbers: explain the "
                f"mean instead, MeanEnsembled(keys={list(keys)}, output_key='pred') before AsDiscreted"
            )
        if isinstance(step, MeanEnsembled) and own:
            missing = [k for k in keys if k not in own]
            if missing:
                raise UsageError(
                    f"MeanEnsembled averages {', '.join(own)}, but not {', '.join(missing)}: name all keys"
                )
            order = [own.index(k) for k in keys]
            ensemble: Any = step.ensemble
            weights = _weights(ensemble.weights, len(own))
            key = str(step.output_key or own[0])
            return MeanOfMembers(average, tuple(weights[i] for i in order), key, tuple(steps[number + 1 :]))
        if isinstance(step, Activationsd) and own:
            if average != "output":
                raise UsageError("two activations before MeanEnsembled: leave one of them out")
            average = _activation(step, keys)
        elif own and not isinstance(step, _COMMUTE):
            raise UsageError(
                f"{type(step).__name__} changes the members' predictions before MeanEnsembled, so their mean is none "
                "of raw outputs or probabilities: put MeanEnsembled before it"
            )
    raise UsageError(
        f"no transform of the postprocessing averages {', '.join(keys)}: add MeanEnsembled(keys={list(keys)}, "
        "output_key='pred'), or explain one network in a SupervisedEvaluator"
    )


def _activation(step: Activationsd, keys: Sequence[str]) -> Average:
    kinds: set[Average | None] = set()
    for key, sigmoid, softmax, other in zip(step.keys, step.sigmoid, step.softmax, step.other):
        if str(key) in keys:
            kinds.add(None if other else "sigmoid" if sigmoid else "softmax" if softmax else "output")
    (kind,) = kinds if len(kinds) == 1 and {str(k) for k in step.keys} >= set(keys) else (None,)
    if kind is None:
        raise UsageError(
            "Activationsd before MeanEnsembled must apply softmax or sigmoid to the predictions of all networks"
        )
    return kind


def _weights(given: Tensor | None, members: int) -> list[float]:
    """Return the share of each member from the weights of `MeanEnsembled`, which MONAI divides by their mean."""
    if given is None:
        return [1 / members] * members
    weights = given.double().reshape(len(given), -1)
    shares = weights / weights.sum(0)
    if len(weights) != members or not torch.allclose(shares, shares[:, :1].expand_as(shares), rtol=1e-6):
        raise UsageError(
            f"MeanEnsembled has weights of shape {tuple(given.shape)} that differ between classes: give one weight "
            f"for each of the {members} networks"
        )
    return [float(share) for share in shares[:, 0]]
