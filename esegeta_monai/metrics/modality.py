"""Images of several contrasts: agreement of the map with the network's use of each channel."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.methods.perturbation.shapley import ChannelShapley
from esegeta_monai.metrics.base import Metric, MetricCost, MetricInput, MetricResult
from esegeta_monai.utils.registry import json_ready

__all__ = ["MSFI", "ModalityImportance", "channel_importance"]


class _Modality(Metric):
    """Base class: computes the exact Shapley value of each channel, from 2^C predictions."""

    group = "modality"
    reference = "Jin et al., AAAI 2022, arXiv:2203.06487"
    higher_is_better = True

    baseline: Any = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        baseline_for(self.baseline)

    def cost(self, objective: Objective) -> MetricCost:
        """One prediction per set of channels, shared by both metrics."""
        return MetricCost(shared=2 ** len(objective.image), group=f"channels {json_ready(self.baseline)!r}")

    def validate(self, subject: MetricInput) -> None:
        super().validate(subject)
        channels = subject.need_objective().image.shape[0]
        if channels < 2:
            raise MetricError(f"{self.name} compares channels, and the image has one")
        if len(subject.map) != channels:
            raise MetricError(
                f"{self.name} needs a map with the image's {channels} channels, this one has {len(subject.map)}: a "
                "method such as GradCam has one map for all channels"
            )


def channel_importance(subject: MetricInput, baseline: Any) -> np.ndarray:
    """Return exact Shapley values of the channels (C,), computed once for all targets and maps."""
    objective = subject.need_objective()

    def find() -> Any:
        maps = ChannelShapley(baseline=baseline).attribute(objective).maps
        return maps.flatten(2).sum(2, dtype=torch.float64).cpu().numpy()

    by = id(baseline) if isinstance(baseline, torch.Tensor) else repr(json_ready(baseline))
    return subject.once(("channel importance", by), find)[subject.target]


class ModalityImportance(_Modality):
    """Correlation over channels between the map's sum and the channel's exact Shapley value (Jin et al. 2022).

    Args:
        correlation: ``"kendall"`` (the paper's: the order of the channels) or ``"pearson"``.
        part: ``"positive"`` (the paper's) sums of the map's positive values, or ``"signed"`` sums.
        baseline: replaces a channel that is off, see `esegeta_monai.engine.baselines`.
    """

    meaning = "Agreement between the map's sum of each channel and its Shapley value; 1: the same order."
    needs = frozenset({"objective"})

    correlation: Literal["kendall", "pearson"] = "kendall"
    part: Literal["positive", "signed"] = "positive"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correlation not in ("kendall", "pearson") or self.part not in ("positive", "signed"):
            raise UsageError(f"{self!r}: correlation is 'kendall' or 'pearson', part 'positive' or 'signed'")

    def measure(self, subject: MetricInput) -> MetricResult:
        """[-1, 1]; undefined where the map's sum is equal for all channels."""
        from scipy.stats import kendalltau

        truth = channel_importance(subject, self.baseline)
        values = subject.map.double() if self.part == "signed" else subject.map.double().clamp(min=0)
        attributed = values.flatten(1).sum(1).cpu().numpy()
        notes = {"map": attributed.tolist(), "shapley": truth.tolist()}
        if np.ptp(attributed) <= 1e-12 * np.abs(attributed).max(initial=0) or np.ptp(truth) == 0:
            return MetricResult.undefined("the map's sums, or the Shapley values, are equal for all channels")
        agreement = (
            kendalltau(attributed, truth).statistic
            if self.correlation == "kendall"
            else np.corrcoef(attributed, truth)[0, 1]
        )
        return MetricResult(float(agreement), notes=notes)


class MSFI(_Modality):
    """Modality-specific feature importance: ``Σ_c φ_c · (Σ_label a_c⁺ / Σ a_c⁺) / Σ_c φ_c`` (Jin et al. 2022): the
    share of the map in the label, channel by channel, weighted by the channel's importance.

    φ_c is the positive part of the channel's exact Shapley value, divided by the greatest of them.

    Args:
        baseline: replaces a channel that is off, see `esegeta_monai.engine.baselines`.
    """

    meaning = "Share of the map that lies in the label, in the channels that matter to the network."
    needs = frozenset({"objective", "label"})

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]; a channel without positive values has no share in the label; undefined where no channel matters."""
        assert subject.label is not None
        weight = np.maximum(channel_importance(subject, self.baseline), 0)
        if not weight.any():
            return MetricResult.undefined("no channel raises the target")
        weight = weight / weight.max()
        values = subject.map.double().clamp(min=0)
        inside = values[:, subject.label.to(values.device)].sum(1).cpu().numpy()
        total = values.flatten(1).sum(1).cpu().numpy()
        share = np.divide(inside, total, out=np.zeros_like(total), where=total > 0)
        notes = {"share": share.tolist(), "weight": weight.tolist()}
        return MetricResult(float((weight * share).sum() / weight.sum()), notes=notes)
