"""Robustness: stability of the map under small changes of the image. The method explains noisy copies of the image.

All these metrics, and all targets of a case, share one set of explanations; only distances between maps are stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.baselines import per_channel
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.run import run
from esegeta_monai.metrics.base import Metric, MetricCost, MetricInput, MetricResult, bootstrap, mean_interval
from esegeta_monai.metrics.removal import at_least

__all__ = ["AverageSensitivity", "LocalLipschitz", "MaxSensitivity", "RelativeInputStability"]
__all__ += ["RelativeOutputStability", "explained"]

ZERO = "the map is zero everywhere, so its stability is meaningless"
CONSTANT = "the image is constant, so that a change in units of its standard deviation changes nothing"
TINY = 1e-12


@dataclass
class Neighbours:
    """Changes of a method's maps for n noisy images: (k, n) per field of maps, (n,) per field of inputs."""

    maps: np.ndarray
    """``‖a' − a‖``."""
    relative_maps: np.ndarray
    """``‖(a' − a) / a‖``, elementwise."""
    norm: np.ndarray
    """``‖a‖`` (k,)."""
    inputs: np.ndarray
    relative_inputs: np.ndarray
    input_norm: float


def explained(subject: MetricInput, objective: Objective) -> Tensor:
    """Return the method's maps (k, C, *spatial), float64, at an objective's image."""
    method = subject.method
    assert method is not None
    return run(method, objective).maps.double()


def neighbours(subject: MetricInput, radius: float, n_samples: int) -> Neighbours:
    """Compare explanations at x + ε with that at x, ε uniform on ``±radius`` times each channel's standard
    deviation."""
    objective, method = subject.need_objective(), subject.method
    assert method is not None
    base = subject.once(("explained", id(method)), lambda: explained(subject, objective))
    return subject.once(
        ("neighbours", id(method), radius, n_samples), lambda: _neighbours(subject, objective, base, radius, n_samples)
    )


def values_near(subject: MetricInput, radius: float, n_samples: int) -> np.ndarray:
    """Return ``|F(x') − F(x)|`` (k, n) of the images of `neighbours`, computed once for all maps."""
    objective = subject.need_objective()

    def find() -> np.ndarray:
        value = objective.image_values().double().cpu()
        noisy = (objective.derive(image=objective.image + noise) for noise in _noise(objective, radius, n_samples))
        return np.stack([(there.image_values().double().cpu() - value).abs().numpy() for there in noisy], 1)

    return subject.once(("values near", radius, n_samples), find)


def _noise(objective: Objective, radius: float, n_samples: int) -> Iterator[Tensor]:
    """Yield noise (C, *spatial); the same for every method."""
    image, generator = objective.image, objective.generator()
    scale = per_channel(image.flatten(1).std(1) * radius, image)
    for _ in range(n_samples):
        yield (torch.rand(image.shape, generator=generator, dtype=torch.float32) * 2 - 1).to(image) * scale


def _neighbours(subject: MetricInput, objective: Objective, base: Tensor, radius: float, n_samples: int) -> Neighbours:
    image = objective.image
    rows: dict[str, list[np.ndarray | float]] = {k: [] for k in ("maps", "relative", "inputs", "shares")}
    for noise in _noise(objective, radius, n_samples):
        maps = explained(subject, objective.derive(image=image + noise))
        rows["maps"].append(_norm(maps - base))
        rows["relative"].append(_norm(torch.where(base == 0, (maps - base) / TINY, (maps - base) / base)))
        rows["inputs"].append(float(noise.double().norm()))
        rows["shares"].append(float((noise.double() / torch.where(image == 0, TINY, image.double())).norm()))
    return Neighbours(
        np.stack(rows["maps"], 1),
        np.stack(rows["relative"], 1),
        _norm(base),
        np.array(rows["inputs"]),
        np.array(rows["shares"]),
        float(image.double().norm()),
    )


def _norm(maps: Tensor) -> np.ndarray:
    return maps.flatten(1).norm(dim=1).cpu().numpy()


class _Robustness(Metric):
    """Base class. Controls that ignore the image are perfectly stable, so maps are not compared with them.

    Args:
        radius: greatest noise, in units of each channel's standard deviation.
        n_samples: number of noisy images.
    """

    group = "robustness"
    higher_is_better = False
    needs = frozenset({"objective", "method"})
    compared = False

    radius: float = 0.02
    n_samples: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "n_samples", self.n_samples, 2)
        if self.radius <= 0:
            raise UsageError(f"{type(self).__name__}: radius={self.radius} must be above 0")

    @abstractmethod
    def _ratio(self, near: Neighbours, k: int) -> np.ndarray:
        """Return the ratio of each noisy image (n,) for target k."""

    def cost(self, objective: Objective) -> MetricCost:
        """One explanation per noisy image, shared by the metrics of this group, and one of the image itself."""
        group = f"noise {self.radius} {self.n_samples}"
        return MetricCost(explanations=self.n_samples + 1, group=group)

    def measure(self, subject: MetricInput) -> MetricResult:
        """0 or more; undefined for a zero map, and for a constant image, near which there is no noise."""
        near, k = neighbours(subject, self.radius, self.n_samples), subject.target
        return self._says_nothing(near, k) or self._sum_up(self._ratio(near, k))

    def _says_nothing(self, near: Neighbours, k: int) -> MetricResult | None:
        if near.norm[k] == 0:
            return MetricResult.undefined(ZERO)
        return None if near.inputs.all() else MetricResult.undefined(CONSTANT)

    def _sum_up(self, ratio: np.ndarray) -> MetricResult:
        """Return the greatest ratio; its bootstrap interval never reaches above it."""
        low, high = bootstrap(lambda s: s.max(1), ratio)
        return MetricResult(float(ratio.max()), low, high, len(ratio), notes={"mean": float(ratio.mean())})


class _Sensitivity(_Robustness):
    def _ratio(self, near: Neighbours, k: int) -> np.ndarray:
        return near.maps[k] / near.norm[k]


class MaxSensitivity(_Sensitivity):
    """``max ‖a(x + ε) − a(x)‖ / ‖a(x)‖`` over uniform noise ``|ε| ≤ radius`` (Yeh et al. 2019).

    Args:
        radius: greatest noise, in units of each channel's standard deviation.
        n_samples: number of noisy images.
    """

    reference = "Yeh et al., NeurIPS 2019, arXiv:1901.09392"
    meaning = "Greatest relative change of the map under small noise on the image; small: stable."


class AverageSensitivity(_Sensitivity):
    """The mean of ``‖a(x + ε) − a(x)‖ / ‖a(x)‖``, see `MaxSensitivity` (Yeh et al. 2019, Bhatt et al. 2020).

    Args:
        radius: greatest noise, in units of each channel's standard deviation.
        n_samples: number of noisy images.
    """

    reference = "Yeh et al., NeurIPS 2019, arXiv:1901.09392; Bhatt et al., IJCAI 2020, arXiv:2005.00631"
    meaning = "Mean relative change of the map under small noise on the image; small: stable."

    def _sum_up(self, ratio: np.ndarray) -> MetricResult:
        return MetricResult(float(ratio.mean()), *mean_interval(ratio), n=len(ratio))


class LocalLipschitz(_Robustness):
    """``max ‖a(x + ε) − a(x)‖ / ‖ε‖`` (Alvarez-Melis & Jaakkola 2018), the map scaled to norm 1, so that maps compare.

    Args:
        radius: greatest noise, in units of each channel's standard deviation.
        n_samples: number of noisy images.
        scaled: divide by ``‖a(x)‖``; False: the paper's constant, in the map's units.
    """

    reference = "Alvarez-Melis & Jaakkola 2018, arXiv:1806.08049"
    meaning = "Greatest change of the map (scaled to norm 1) for a change of the image of norm 1; small: smooth."

    scaled: bool = True

    def _ratio(self, near: Neighbours, k: int) -> np.ndarray:
        return near.maps[k] / near.inputs / (near.norm[k] if self.scaled else 1.0)


class RelativeInputStability(_Robustness):
    """``max [‖a' − a‖ / ‖a‖] / [‖x' − x‖ / ‖x‖]`` (Agarwal et al. 2022).

    Args:
        radius: greatest noise, in units of each channel's standard deviation.
        n_samples: number of noisy images.
        ratio: ``"norms"``, or ``"elementwise"`` as in the paper, ``‖(a' − a) / a‖ / ‖(x' − x) / x‖``, which is
            dominated by voxels of value near zero, the majority in a volume with background.
    """

    reference = "Agarwal et al. 2022, arXiv:2203.06877"
    meaning = "Greatest relative change of the map over the relative change of the image; 1: as stable as the image."

    ratio: Literal["norms", "elementwise"] = "norms"

    def _ratio(self, near: Neighbours, k: int) -> np.ndarray:
        if _elementwise(self.ratio):
            return near.relative_maps[k] / near.relative_inputs
        return near.maps[k] / near.norm[k] / (near.inputs / near.input_norm)


class RelativeOutputStability(_Robustness):
    """``max [‖a' − a‖ / ‖a‖] / [|F(x') − F(x)| / |F(x)|]`` (Agarwal et al. 2022, of the target in place of all logits).

    Args:
        radius: greatest noise, in units of each channel's standard deviation.
        n_samples: number of noisy images.
        ratio: ``"norms"``, or ``"elementwise"`` as in the paper, ``‖(a' − a) / a‖``.
        least: lower limit of the relative change of the target in the denominator.
    """

    reference = "Agarwal et al. 2022, arXiv:2203.06877"
    meaning = "Greatest relative change of the map over that of the target; 1: as stable as the target."

    ratio: Literal["norms", "elementwise"] = "norms"
    least: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.least <= 0:
            raise UsageError(f"RelativeOutputStability: least={self.least} must be above 0")

    def cost(self, objective: Objective) -> MetricCost:
        """As the other metrics of this group; and one prediction per noisy image."""
        return replace(super().cost(objective), shared=self.n_samples + 1)

    def measure(self, subject: MetricInput) -> MetricResult:
        """0 or more; undefined for a zero map or a constant image, or where the target is zero."""
        near, k = neighbours(subject, self.radius, self.n_samples), subject.target
        nothing = self._says_nothing(near, k)
        if nothing is not None:
            return nothing
        value = abs(float(subject.need_objective().image_values()[k]))
        if value == 0:
            return MetricResult.undefined("the target is zero at the image")
        changed = np.maximum(values_near(subject, self.radius, self.n_samples)[k] / value, self.least)
        return self._sum_up(self._ratio(near, k) / changed)

    def _ratio(self, near: Neighbours, k: int) -> np.ndarray:
        return near.relative_maps[k] if _elementwise(self.ratio) else near.maps[k] / near.norm[k]


def _elementwise(ratio: str) -> bool:
    if ratio not in ("norms", "elementwise"):
        raise UsageError(f"ratio={ratio!r}: give 'norms' or 'elementwise'")
    return ratio == "elementwise"
