"""Wrappers that run another method on noisy copies of the image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from esegeta_monai.engine.baselines import noise_like
from esegeta_monai.engine.default_layer import default_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import METHODS, Explained, Method
from esegeta_monai.methods.run import run
from esegeta_monai.methods.stopping import RunningMean, RunningMoments, check_tolerance

__all__ = ["SmoothGrad", "SmoothGradSquared", "VarGrad"]


class SmoothGrad(Method):
    """The mean of a method's maps over noisy images: ``a = 1/n Σ_i A(x + ε_i)`` (Smilkov et al. 2017).

    Noise is drawn once for the volume, with the run's seed, so that overlapping windows see the same noise.

    Args:
        method: the inner method (an instance, a config or text); any method that gives a map of the image or of a
            layer. Where it chooses a default layer, the layer is that of the image without noise.
        n_samples: n.
        std: standard deviation of the noise, in units of each channel's standard deviation.
        tolerance: if given, samples are drawn until the largest error of a voxel is at most ``tolerance`` of the
            largest absolute voxel, with 95 % confidence (`esegeta_monai.methods.stopping.RunningMean`), or until
            ``max_samples``; at least 16, and ``n_samples`` is not used. The record has the number, and the bound as
            ``sampling_error``.
        max_samples: largest number of samples with ``tolerance``.

    Example:
        >>> SmoothGrad("InputXGradient", n_samples=4).method.name
        'InputXGradient'
    """

    reference = "Smilkov et al. 2017, arXiv:1706.03825"
    produces = "input map"
    additive = True

    method: Any = "Saliency(abs=False)"
    n_samples: int = 10
    std: float = 0.15
    tolerance: float | None = None
    max_samples: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method: Method = METHODS.create(self.method)
        if self.method.produces == "synthesised image":
            raise UsageError(f"{type(self).__name__} needs a method with a map, not {self.method.name}")
        if self.n_samples < 1:
            raise UsageError(f"n_samples={self.n_samples}: at least one sample is needed")
        check_tolerance(self)
        if self.std < 0:
            raise UsageError(f"std={self.std}: noise cannot have a negative standard deviation")
        self.produces = self.method.produces  # type: ignore[misc]
        self.additive = self.method.additive  # type: ignore[misc]
        self.full_precision = self.method.full_precision  # type: ignore[misc]
        self.needs_gradient = self.method.needs_gradient  # type: ignore[misc]
        self.needs_linear = self.method.needs_linear  # type: ignore[misc]
        self.needs_positive = self.method.needs_positive  # type: ignore[misc]

    @property
    def signed(self) -> bool:
        return self.method.signed

    @property
    def units(self) -> str:
        return self.method.units

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        return self._average(objective)

    def _average(self, objective: Objective, square: bool = False) -> Explained:
        """Return the mean of the maps (k, C, *spatial), or of their squares."""
        if self.tolerance is not None:
            mean = RunningMean(self.max_samples, self.tolerance)
            for maps in self._samples(objective):
                if mean.add(maps.square() if square else maps):
                    break
            return Explained(mean.mean, {**self._layer(objective), **mean.notes()})
        total: Tensor | None = None
        for maps in self._samples(objective):
            maps = maps.square() if square else maps
            total = maps.clone() if total is None else total.add_(maps)
        assert total is not None
        return Explained(total / self.n_samples, self._layer(objective))

    @property
    def completeness_bound(self) -> float:
        return self.gap_bound

    @property
    def passes_data_dependent(self) -> bool:
        return self.tolerance is not None or super().passes_data_dependent

    @property
    def _most(self) -> int:
        """The largest number of samples."""
        return self.n_samples if self.tolerance is None else self.max_samples

    def _layer(self, objective: Objective) -> dict[str, Any]:
        """Return the layer of the inner method, for the record; chosen at the image without noise."""
        layer = getattr(self.method, "layer", None)
        if self.produces not in ("layer map", "activation"):
            return {}
        return {"layer": default_layer(objective) if layer is None else layer}

    def passes(self, objective: Objective) -> int:
        """Count the inner method's passes per sample, and a prediction where F at the noisy image is needed."""
        asked = self.method.reads_image_value or not objective.linear
        prediction = len(objective.windows) if asked else 0
        return self._most * (prediction + self.method.passes(objective))

    @property
    def passes_exact(self) -> bool:
        """False for black-box methods: the windows that a perturbation changes differ between noisy images."""
        return super().passes_exact and self.method.needs_gradient

    def _samples(self, objective: Objective) -> Iterator[Tensor]:
        """Yield the method's maps (k, C, *spatial) at each noisy image."""
        generator = objective.generator()
        self._layer(objective)  # a default layer is chosen once, and passes on to the noisy images
        for _ in range(self._most):
            noisy = objective.image + noise_like(objective.image, self.std, generator)
            yield run(self.method, objective.derive(image=noisy)).maps


class SmoothGradSquared(SmoothGrad):
    """The mean of the squares of a method's maps over noisy images: ``a = 1/n Σ_i A(x + ε_i)²`` (Hooker et al. 2019).

    Maps are squared after the windows have been added.

    Args:
        method, n_samples, std, tolerance, max_samples: see `SmoothGrad`.
    """

    reference = "Hooker et al., NeurIPS 2019, arXiv:1806.10758"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.additive = False  # type: ignore[misc]

    @property
    def signed(self) -> bool:
        return False

    @property
    def units(self) -> str:
        return f"({self.method.units})²"

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        return self._average(objective, square=True)


class VarGrad(SmoothGradSquared):
    """The variance of a method's maps over noisy images: ``a = 1/n Σ_i (A(x + ε_i) − Ā)²`` (Adebayo et al. 2018).

    Args:
        method, n_samples, std: see `SmoothGrad`; ``tolerance`` is refused, since the error of a variance is not that of
            a mean.
    """

    reference = "Adebayo et al., ICLR workshop 2018, arXiv:1810.03307"
    cheap_parameters = (("n_samples", 8),)  # the variance of few gradients is hardly more than one difference

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance is not None:
            raise UsageError("VarGrad: tolerance is for means of maps; give n_samples")

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        moments = RunningMoments()
        for maps in self._samples(objective):
            moments.add(maps)
        return Explained(moments.squares / self.n_samples, self._layer(objective))
