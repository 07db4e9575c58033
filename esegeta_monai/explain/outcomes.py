"""Build the attributions of a case: the map of a method, or the reason why there is none, with its record."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai.engine.resampled import OUTPUT_GRID, OutputMasks, ResampledScore
from esegeta_monai.engine.score import Score
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import MethodError, MethodTimeout, RankLost, named_reason
from esegeta_monai.explain.agreement import AgreementMaps, Kind, compared, summary
from esegeta_monai.explain.attribution import Attribution, like_image, mask_on_image
from esegeta_monai.explain.case import CaseInput
from esegeta_monai.explain.record import Record, inputs_sha256, tensor_hash
from esegeta_monai.explain.settings import Settings
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.completeness import is_incomplete
from esegeta_monai.targets.base import Target
from esegeta_monai.utils.files import versions
from esegeta_monai.utils.registry import json_ready
from esegeta_monai.utils.tensors import all_finite, largest

__all__ = ["NOTHING_THERE", "BoundTarget", "Outcomes", "not_linear", "not_positive"]

logger = logging.getLogger("esegeta_monai")

NO_LABEL = "no class of the prediction is above its threshold, so there is nothing to explain"
NOTHING_THERE = "no voxel of the prediction belongs to {}, so there is nothing to explain"


@dataclass
class BoundTarget:
    """A target and one of its scores, or the error that was raised when it was bound."""

    target: Target
    score: Score | None
    error: Exception | None = None
    label: str = field(init=False)
    hash: str | None = field(init=False)

    def __post_init__(self) -> None:
        score = self.score
        self.label = score.label if score is not None else self.target.name or type(self.target).__name__
        self.hash = None
        if score is not None:
            self.hash = tensor_hash(score.mask, *[[b.start, b.stop] for b in score.box], *score.meaning)


class Outcomes:
    """Builder of the attributions of a case, with and without a map.

    Args:
        settings: settings of the explainer.
        case: the explained case.
    """

    def __init__(self, settings: Settings, case: CaseInput) -> None:
        self.settings, self.case = settings, case
        self._records: dict[tuple[int, int], tuple[Method, BoundTarget, Record]] = {}

    def record(self, method: Method, bound: BoundTarget, plan: WindowPlan | None) -> Record:
        """Return the record of what is known before the method runs, with None for the rest; a new one at each call."""
        key = (id(method), id(bound))  # both are kept, so that no other object gets the same id
        if key in self._records:
            known = self._records[key][2]
            return replace(known, warnings=[], more=dict(known.more))
        score, case, names = bound.score, self.case, list(self.settings.channel_names)
        label = _scalar(case.data.get("label")) if case.data else None
        record = Record(
            method=type(method).__name__,
            method_name=method.name,
            parameters=method.parameters,
            produces=method.produces,
            additive=method.additive,
            signed=method.signed,
            units=method.units,
            reference=method.reference,
            target=type(bound.target).__name__,
            target_name=bound.label,
            target_parameters=bound.target.parameters,
            target_voxels=0 if score is None else score.voxels,
            target_sha256=bound.hash,
            inputs_sha256=inputs_sha256(method, case),
            class_index=None if score is None else score.class_index,
            class_name=None if score is None else score.class_name,
            channel_names=names if len(names) == case.image.shape[0] else [],
            coverage=None if plan is None else plan.coverage,
            windows_total=None if plan is None else len(plan),
            **(self.settings.record | ({"amp": None} if method.full_precision else {}) | case.record),
            value_units=None if score is None else score.units,
            checks=[check.entry() for check in case.checks] or None,
            versions=versions(),
            label=label,
        )
        if self.settings.agreement and (kinds := compared(plan)):
            record.agreement = {"of": kinds}
        own: OutputMasks | None = case.data.get(OUTPUT_GRID)
        if own is not None:
            on_scan = isinstance(score, ResampledScore)
            record.more |= {"mask_grid": "scan" if on_scan else "network", "own_prediction": dict(own.record)}
        if score is not None:
            record.more |= score.notes
        self._records[key] = method, bound, record
        return replace(record, warnings=[], more=dict(record.more))

    def finished(
        self,
        method: Method,
        bound: BoundTarget,
        record: Record,
        outcome: Explained,
        k: int,
        alone: Mapping[Kind, tuple[Sequence[float], list[Tensor]]] | None = None,
    ) -> Iterator[Attribution]:
        """Yield the attribution of target k, or one per image input if the network has several.

        Args:
            alone: shares and maps (C, *spatial) of the members and of the views alone, where they are compared.
        """
        record.update(json_ready(outcome.note(k)))
        if record.amp_fallback is not None:
            record.warnings = [*record.warnings, f"computed in float32: {record.amp_fallback}"]
        unknown = _not_finite(record)
        if unknown is not None:
            yield self.failed(method, bound, record, MethodError(f"{method.name}: {unknown}"))
            return
        case, channels = self.case, self.case.channels
        values = outcome.maps[k]
        per_input = bool(channels) and values.shape[0] == sum(channels.values())
        parts = dict(zip(channels, values.split(list(channels.values())))) if per_input else {None: values}
        mask = mask_on_image(bound.score, case.image)
        for name, part in parts.items():
            own = replace(record, more=dict(record.more))
            finite = all_finite(part)
            own.sum = float(part.sum(dtype=torch.float64)) if finite else None
            own.status = self._status(method, own, part) if finite else "failed"
            if name is not None:
                own.input = name
            if method.produces == "input map" and len(part) == 1 < case.image.shape[0] and name is None:
                own.channels, own.channel_names = "all", ["all channels"]
            if not finite:
                bad = int((~torch.isfinite(part)).sum())
                error = MethodError(
                    f"{method.name}: {bad} of {part.numel()} values of the map are not finite: switch amp off, or "
                    "choose another method for this network"
                )
                yield self.failed(method, bound, own, error)
                continue
            if own.status == "zero":
                own.warnings = [
                    *own.warnings,
                    "the map is zero everywhere: the target does not depend on the image, or nothing propagates to it",
                ]
            start = list(parts).index(name) if name is not None else 0
            first = sum(list(channels.values())[:start]) if per_input else 0
            maps = AgreementMaps([], [])
            for kind, (shares, whole) in (alone or {}).items():
                own_maps = [m[first : first + len(part)] for m in whole]
                generator = torch.Generator().manual_seed(self.settings.seed)
                own.agreement = {**(own.agreement or {}), kind: summary(own_maps, shares, part, kind, generator)}
                maps.of(kind).extend(like_image(m, case.image) for m in own_maps)
            attribution = like_image(part, case.image)
            yield Attribution(
                attribution,
                method,
                bound.target,
                case.index,
                own.to_json(),
                bound.label,
                mask,
                name,
                agreement=maps if alone else None,
                image=case.image if name is None else self._input_image(name),
            )

    def _input_image(self, name: str) -> MetaTensor:
        """Return the channels (C, *spatial) of one of several image inputs."""
        channels = self.case.channels
        parts = self.case.image.split(list(channels.values()))
        return cast(MetaTensor, parts[list(channels).index(name)])

    @staticmethod
    def _status(method: Method, record: Record, part: Tensor) -> str:
        if largest(part) == 0:
            return "zero"
        incomplete = is_incomplete(method, record.completeness_gap, record.completeness_gap_of_map)
        return "incomplete" if incomplete else "ok"

    def failed(self, method: Method, bound: BoundTarget, record: Record, error: Exception) -> Attribution:
        """Return the attribution of a failure: without a map, with the reason in the record.

        Raises:
            Exception: the error itself, with ``on_error="raise"``.
        """
        if self.settings.on_error == "raise" or isinstance(error, RankLost):
            raise error
        record.status = "timeout" if isinstance(error, MethodTimeout) else "failed"
        record.reason = named_reason(error)
        logger.debug("case %d: %s, %s failed", self.case.index, method.name, bound.label, exc_info=error)
        return Attribution(None, method, bound.target, self.case.index, record.to_json(), bound.label, error=error)

    def empty(self, method: Method, bound: BoundTarget, record: Record) -> Attribution:
        """Return the attribution of a target without voxels."""
        record.status = "empty_target"
        image_label = bound.score is not None and not bound.score.box
        record.reason = NO_LABEL if image_label else NOTHING_THERE.format(bound.label)
        return Attribution(None, method, bound.target, self.case.index, record.to_json(), bound.label)


def _scalar(label: Any) -> int | None:
    """Return a label of one number; None for a label map, a file, or nothing."""
    if isinstance(label, (Tensor, np.ndarray)):
        values = torch.as_tensor(label).flatten()
        label = values[0].item() if len(values) == 1 else None
    whole = isinstance(label, (int, float, np.integer)) and not isinstance(label, bool) and label == int(label)
    return int(label) if whole else None


def _not_finite(record: Record) -> str | None:
    """Return why the values of F in a record make its map meaningless; None if they are finite."""
    if record.value is not None and not math.isfinite(record.value):
        return f"the score F is {record.value:g} at the image: choose another target or output"
    if record.baseline_value is not None and not math.isfinite(record.baseline_value):
        return (
            f"the score F is {record.baseline_value:g} at the baseline, so the map explains no difference: choose "
            "another baseline, such as baseline='blur(sigma=4)' (a network that divides by the deviation of its input "
            "has no output for a constant one)"
        )
    gap = record.completeness_gap
    if gap is not None and not math.isfinite(gap):
        return f"the completeness gap is {gap:g}: the sums of the map or of the score are not finite"
    return None


def not_positive(method: Method, label: str) -> MethodError:
    """Return the error of a method that propagates positive signals for a target whose score falls with an output."""
    return MethodError(
        f"{method.name} propagates positive signals only, and {label} falls with an output (a negative start): explain "
        "the output that it falls with, or use ContrastiveExcitationBackprop, or a method with signs such as LRP"
    )


def not_linear(method: Method, bound: BoundTarget) -> MethodError:
    """Return the error of a method that needs a linear score for a target whose score is not linear."""
    return MethodError(
        f"{method.name} is defined for linear scores, and {bound.label} is not linear in the prediction: "
        "use output='logit' for it, or a method such as IntegratedGradients or DeepLift"
    )
