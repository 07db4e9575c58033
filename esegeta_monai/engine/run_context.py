"""The state of a run: what belongs to the computation and not to F."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.engine.progress import Progress
from esegeta_monai.utils.distributed import Processes

__all__ = ["RunContext", "SampleComplete", "ScoreSample"]


@dataclass(eq=False)
class RunContext:
    """Progress, processes, checkpoint and batch size of a run; objectives derived from one another share one.

    Attributes:
        progress: passes, time limit, warnings.
        processes: the processes that compute this case together, each with the same arguments.
        checkpoint: where perturbation scores are stored while the run goes on; None: nowhere.
        window_batch: windows per forward pass, halved when memory runs out; None: that of the window plan.
        precision_decided: True: methods run in the precision of the objective and are not measured first, see
            `esegeta_monai.methods.precision`.
        layer_positions: number of positions per axis in a window, of each layer whose map was read.
        local: compute perturbed windows in parts where that saves work, see `esegeta_monai.engine.local.passes`.
        local_note: what the last scored perturbations computed in parts; None: nothing has been scored.
        sample: set where only a sample of a method's perturbation scores is wanted; None: all are.
    """

    progress: Progress = field(default_factory=Progress)
    processes: Processes = field(default_factory=Processes)
    checkpoint: ScoreCheckpoint | None = None
    window_batch: int | None = None
    precision_decided: bool = False
    local: bool = True
    local_note: dict[str, Any] | None = None
    sample: ScoreSample | None = None
    layer_positions: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def for_sample(perturbations: int, window_batch: int, *, local: bool = True) -> RunContext:
        """Return the context of a trial run in this process: silent, without time limit, checkpoint or measurement.

        Args:
            perturbations: how many perturbations are scored per window before the method stops.
            window_batch: windows per forward pass.
            local: as in the run.
        """
        progress, sample = Progress(silent=True), ScoreSample(perturbations)
        return RunContext(progress, window_batch=window_batch, precision_decided=True, sample=sample, local=local)


class SampleComplete(Exception):  # noqa: N818 - no error: it ends a method whose sample is complete
    """Ends a method after its first scores, which `RunContext.sample` holds."""


@dataclass(eq=False)
class ScoreSample:
    """The first perturbation scores of a method.

    Attributes:
        perturbations: how many are scored per window.
        scores: (k, n), float64; None before they have been computed.
    """

    perturbations: int
    scores: Tensor | None = None

    def take(self) -> Tensor | None:
        """Return the scores (k, n) and forget them."""
        scores, self.scores = self.scores, None
        return scores
