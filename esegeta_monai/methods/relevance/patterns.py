"""The network's signal in the image, by patterns fitted on data."""

from __future__ import annotations

import os
import pickle
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.baselines import Image
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_maps import LayerOutput
from esegeta_monai.engine.network.state import weights_hash
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.precision import full_precision
from esegeta_monai.utils.weights_only import read_weights

__all__ = ["FittedPatterns", "PatternAttribution", "PatternNet"]

_FORMAT = "esegeta_monai patterns 1"


@dataclass(frozen=True)
class FittedPatterns:
    """Fitted patterns and the hash of their weights, stored in a file beside the weights.

    Attributes:
        patterns: one per operation of the network, in execution order; None where an operation has none.
        weights_sha256: hash of the weights that they were fitted for, see
            `esegeta_monai.engine.network.state.weights_hash`.
        cases: number of cases that they were fitted on.
    """

    patterns: list[rules.Pattern | None]
    weights_sha256: str
    cases: int

    @classmethod
    def fit(cls, objectives: Iterable[Objective]) -> FittedPatterns:
        """Fit patterns on all windows of some cases of one network.

        Raises:
            UsageError: there is no case.
            RuleError: an operation that has no pattern, such as attention.
        """
        fit, cases, network = rules.PatternFit(), 0, None
        for objective in objectives:
            jobs = [(0, w) for w in range(len(objective.plan))]
            precise = full_precision(objective)
            precise.each(jobs, lambda b: fit.add(b.forward, b.image, compare=b.compare), with_cotangents=False)
            cases, network = cases + 1, objective.model.network
        if network is None:
            raise UsageError("patterns are fitted on cases: give at least one case")
        return cls(fit.patterns(), weights_hash(_whole(network)), cases)

    def save(self, path: str | Path) -> None:
        """Write a file atomically that `torch.load` reads with ``weights_only=True``."""
        content = {
            "format": _FORMAT,
            "weights_sha256": self.weights_sha256,
            "cases": self.cases,
            "patterns": [p if p is None else (p.name, p.positive.cpu(), p.negative.cpu()) for p in self.patterns],
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            torch.save(content, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> FittedPatterns:
        """Read a file that `save` wrote.

        Raises:
            UsageError: no such file, or no patterns in it.
        """
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"no file {path.name}: fit patterns with 'esegeta-monai patterns', or give cases=")
        try:
            content = read_weights(path)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise UsageError(
                f"{path.name} cannot be read as patterns ({type(error).__name__}): fit them again"
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise UsageError(f"{path.name} has no patterns: fit them with 'esegeta-monai patterns'")
        patterns = [None if entry is None else rules.Pattern(*entry) for entry in content["patterns"]]
        return cls(patterns, content["weights_sha256"], content["cases"])


def _whole(network: nn.Module) -> nn.Module:
    return network.network if isinstance(network, LayerOutput) else network


class PatternAttribution(Method):
    """``r_in = (w ⊙ a)ᵀ r``, from ``r = y · ∂s/∂y`` at the output: the contribution of each voxel's signal to the
    score.

    a is the pattern of each linear neuron, ``cov(x, y) / var(y)`` in the regime of the following rectifier, fitted on
    cases (Kindermans et al. 2018). It points in the direction in which the data vary with the neuron, while the filter
    w also cancels distractors. Batch, instance and group norms (σ constant) pass relevance on; the terms of a sum get
    their shares of its variance; rectifiers, pooling and interpolation keep their derivative. Linear scores only. A
    network with products of two tensors (attention, gates), softmax or layer norm has operations that are no linear
    neurons, and is refused.

    Args:
        patterns: a file of patterns (``esegeta-monai patterns`` writes one). If it does not exist and cases are given,
            it is written.
        cases: NIfTI files on the network's grid or tensors (C, *spatial), preprocessed like the image, on which the
            patterns are fitted where there is no file.

    Raises:
        UsageError: neither patterns nor cases.
        MethodError: the patterns were fitted for other weights.

    Example:
        >>> PatternAttribution(patterns="models/patterns.pt").parameters["patterns"]
        'patterns.pt'
    """

    for_ensembles = False
    reference = "Kindermans et al., ICLR 2018, arXiv:1705.05598"
    produces = "input map"
    additive = True
    units = "target per voxel"
    full_precision = True
    needs_linear = True

    way: ClassVar[rules.Way] = "attribution"

    patterns: str | Path | None = None
    cases: Sequence[Any] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.patterns = None if self.patterns is None else Path(self.patterns)
        self._fitted: dict[str, FittedPatterns] = {}
        if self.patterns is None and not len(self.cases):
            raise UsageError(
                f"{type(self).__name__} needs patterns that were fitted on data: give patterns='FILE' (written by "
                "'esegeta-monai patterns'), or cases=[…]"
            )

    def passes(self, objective: Objective) -> int:
        """One pass, and a second one of the first window, to compare its output under the rules with the plain one.

        The same for each case that patterns are fitted on.
        """
        known = self._fitted or (self.patterns is not None and Path(self.patterns).is_file())
        fitting = 0 if known else len(self.cases) * (len(objective.plan) + 1)
        return fitting + len(objective.windows) + 1

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        fitted = self._patterns_for(objective)

        def of(batch: Batch) -> Tensor:
            cotangents = batch.stacked_cotangents()
            return rules.back_project(
                batch.forward, batch.image, cotangents, fitted.patterns, self.way, compare=batch.compare
            )

        maps, padding = objective.scatter(of)
        return Explained(maps, {"pattern_cases": fitted.cases, "sum_in_padding": padding.sum(1, dtype=torch.float64)})

    def _patterns_for(self, objective: Objective) -> FittedPatterns:
        expected = weights_hash(_whole(objective.model.network))
        if expected in self._fitted:
            return self._fitted[expected]
        if self.patterns is not None and (Path(self.patterns).is_file() or not len(self.cases)):
            fitted = FittedPatterns.load(self.patterns)
            if fitted.weights_sha256 != expected:
                raise MethodError(
                    f"the patterns in {Path(self.patterns).name} were fitted for other weights than the network has: "
                    "fit them again with 'esegeta-monai patterns'"
                )
        else:
            volumes = [Image(case).draw(objective, objective.generator()) for case in self.cases]
            fitted = FittedPatterns.fit(objective.derive(image=volume) for volume in volumes)
            if self.patterns is not None:
                fitted.save(self.patterns)
        self._fitted[expected] = fitted
        return fitted


class PatternNet(PatternAttribution):
    """``s_in = aᵀ s``, from ``s = y · ∂s/∂y`` at the output: the network's estimate of the signal itself.

    Parameters and errors of `PatternAttribution`; patterns replace the filters of a gradient. Norms, which scale by s,
    pass on ``1 / s``.
    """

    additive = False
    needs_positive = True  # its patterns are those of positive outputs
    units = "signal, in units of image intensity"

    way: ClassVar[rules.Way] = "signal"
