"""Baselines: reference inputs that represent the absence of a feature.

A baseline is given as text (``"blur(sigma=4)"``), a number, a NIfTI file, a tensor, or one of these classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.model import out_of_memory
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.utils.registry import Configurable, Registry, json_ready
from esegeta_monai.utils.whole_files import check_whole

__all__ = ["BASELINES", "Auto", "Background", "Baseline", "Blur", "Cases", "Constant", "Image", "Mean", "Minimum"]
__all__ += ["Noise", "Uniform", "Zero", "baseline_for", "choice_passes", "has_scale_free_norm", "scale_invariant"]


class Baseline(Configurable, ABC):
    """A reference input, or a distribution of reference inputs.

    Attributes:
        random: True if two draws may differ; False: one draw suffices.
    """

    random = True

    @abstractmethod
    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        """Draw one reference volume (C, *spatial) for the case. It may be a view and must not be written into."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        BASELINES.register(cls, *cls.__dict__.get("aliases", ()))

    def passes(self, objective: Objective) -> int:
        """Return the number of window passes of the first `draw` on an objective; later draws need none."""
        return 0

    def record(self) -> dict[str, Any]:
        """Return the sidecar entry: name and parameters of the baseline, and the reason of an automatic choice."""
        return {"name": type(self).__name__.lower(), **self.parameters}


BASELINES: Registry[Baseline] = Registry("baseline", Baseline, "esegeta_monai.engine.baselines", command=False)


class Constant(Baseline):
    """The same value everywhere: one number, or one per channel."""

    value: float | Sequence[float] = 0.0
    random = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not bool(torch.isfinite(torch.as_tensor(self.value, dtype=torch.float64)).all()):
            raise UsageError(f"constant baseline: {self.value} is infinite")

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        image = objective.image
        value = torch.as_tensor(self.value, dtype=image.dtype, device=image.device).flatten()
        if len(value) not in (1, image.shape[0]):
            raise UsageError(f"constant baseline: {len(value)} values for {image.shape[0]} channels")
        return per_channel(value.expand(image.shape[0]), image)


class Zero(Baseline):
    """Zeros. Unsuitable for paths under instance, group or layer norm, where ``f(αx) = f(x)``."""

    random = False

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        return per_channel(torch.zeros(len(objective.image)), objective.image)


class Minimum(Baseline):
    """The smallest value of each channel."""

    aliases = ("min",)
    random = False

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        return per_channel(objective.image.flatten(1).amin(1), objective.image)


class Mean(Baseline):
    """The mean of each channel."""

    random = False

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        return per_channel(objective.image.flatten(1).mean(1), objective.image)


class Background(Baseline):
    """The background value of each channel: the median of the voxels on the faces of the volume."""

    random = False

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        image = objective.image
        faces = [image.select(axis, end).flatten(1) for axis in range(1, image.ndim) for end in (0, -1)]
        return per_channel(torch.cat(faces, 1).median(1).values, image)


class Blur(Baseline):
    """The image blurred by a Gaussian, plus noise.

    Args:
        sigma: standard deviation of the Gaussian in voxels; None: an eighth of the shortest window side.
        std: standard deviation of the noise, in units of each channel's standard deviation.
    """

    sigma: float | None = None
    std: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std < 0 or (self.sigma or 0) < 0:
            raise UsageError(f"blur(sigma={self.sigma}, std={self.std}): neither can be negative")
        self.random = self.std > 0

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        self.used_sigma = min(r for r in objective.plan.roi if r > 1) / 8 if self.sigma is None else self.sigma
        blurred = gaussian_blur(objective.image, self.used_sigma)
        return blurred + noise_like(objective.image, self.std, generator) if self.std else blurred

    def record(self) -> dict[str, Any]:
        return {**super().record(), "sigma_voxels": getattr(self, "used_sigma", self.sigma)}


class Noise(Baseline):
    """Gaussian noise around each channel's mean.

    Args:
        std: standard deviation of the noise, in units of each channel's standard deviation.
    """

    std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.std < 0:
            raise UsageError(f"noise(std={self.std}): it cannot be negative")

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        image = objective.image
        return per_channel(image.flatten(1).mean(1), image) + noise_like(image, self.std, generator)


class Uniform(Baseline):
    """Uniform noise between the smallest and largest value of each channel."""

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        image = objective.image
        low, high = image.flatten(1).amin(1), image.flatten(1).amax(1)
        drawn = torch.rand(image.shape, generator=generator, dtype=torch.float32).to(image.device, image.dtype)
        return per_channel(low, image) + drawn * per_channel(high - low, image)


class Cases(Baseline):
    """Other cases, one drawn at random each time: images of the same shape, preprocessed like the case.

    Args:
        files: NIfTI files, or tensors (C, *spatial).
    """

    files: Sequence[Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.files):
            raise UsageError("the baseline cases(files=…) needs at least one file")

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        which = int(torch.randint(len(self.files), (1,), generator=generator))
        return _load_volume(self.files[which], objective)


class Image(Baseline):
    """A given image: a NIfTI file on the network's grid, or a tensor (C, *spatial)."""

    file: Any
    random = False

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        return _load_volume(self.file, objective)


class Auto(Baseline):
    """A baseline chosen for the network.

    Path, DeepLIFT and Shapley methods: zero, unless the network has instance, group or layer norm, or a test shows that
    it is invariant to the scale of its input; then a Gaussian blur plus seeded noise. Perturbation methods
    (``local=True``): the background value of the image.

    Args:
        local: True: the baseline replaces parts of the image; False: the whole image.
        std: standard deviation of the noise, in units of each channel's standard deviation.
    """

    local: bool = False
    std: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.random = not self.local

    def draw(self, objective: Objective, generator: torch.Generator) -> Tensor:
        self.chosen, self.reason = self._choose(objective)
        return self.chosen.draw(objective, generator)

    def passes(self, objective: Objective) -> int:
        asks = not self.local and not has_scale_free_norm(objective.model.network)
        return 2 if asks and objective.windows and not objective.knows("scale invariant") else 0

    def _choose(self, objective: Objective) -> tuple[Baseline, str]:
        if self.local:
            return Background(), "the image's background value"
        norms = has_scale_free_norm(objective.model.network)
        if norms:
            return Blur(
                std=self.std
            ), f"the network has {norms}: f(αx) = f(x), so the gradient along a path from zero is zero"
        if scale_invariant(objective):
            return Blur(std=self.std), "the network was found to be invariant to the scale of its input"
        return Zero(), "the network is not invariant to the scale of its input"

    def record(self) -> dict[str, Any]:
        chosen: Baseline | None = getattr(self, "chosen", None)
        if chosen is None:
            return super().record()
        return {**chosen.record(), "chosen_by": "auto", "reason": self.reason}


def choice_passes(spec: Any, objective: Objective) -> int:
    """Return the window passes of a baseline, given as in `baseline_for`, on an objective, for any number of draws."""
    return baseline_for(spec).passes(objective)


def baseline_for(spec: Any, *, local: bool = False) -> Baseline:
    """Make a `Baseline` from the value of a ``baseline`` parameter.

    ``baseline_for(spec).draw(objective, objective.generator())`` is the reference volume (C, *spatial) of a case, in
    the units of the image. It may be a view: do not write into it.

    Args:
        spec: a `Baseline`, its name or call as text, ``"auto"``, a number or one per channel, a NIfTI file, a tensor
            (C, *spatial), or a list of files or tensors to draw from.
        local: for ``"auto"``. True: the baseline replaces a part of the image, not all of it.

    Raises:
        UsageError: no such baseline.

    >>> baseline_for("blur(sigma=3)").parameters
    {'sigma': 3, 'std': 0.0}
    """
    if isinstance(spec, Baseline):
        return spec
    if isinstance(spec, str) and spec.strip().lower() == "auto":
        return Auto(local=local)
    if isinstance(spec, bool) or spec is None:
        raise UsageError(f"baseline={spec!r}: give 'auto', 'zero', 'blur(sigma=…)', a number, or a NIfTI file")
    if isinstance(spec, (int, float)):
        return Constant(float(spec))
    if isinstance(spec, Tensor) or (isinstance(spec, (str, Path)) and str(spec).endswith((".nii", ".nii.gz"))):
        return Image(spec)
    if isinstance(spec, (list, tuple)):
        numbers = spec and all(isinstance(v, (int, float)) for v in spec)
        return Constant(list(spec)) if numbers else Cases(spec)
    return BASELINES.create(spec)


def has_scale_free_norm(network: nn.Module) -> str:
    """Name the norm layers that remove the scale of their input (instance, group and layer norm); empty if none."""
    kinds = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    return ", ".join(sorted({type(m).__name__ for m in network.modules() if isinstance(m, kinds)}))


def scale_invariant(objective: Objective) -> bool:
    """Return True if halving the input of one window changes the output by less than 1 % of its spread.

    The test runs once per objective and costs two window passes.
    """
    if not objective.windows:
        return False
    return objective.memo("scale invariant", lambda: _is_scale_invariant(objective))


def _is_scale_invariant(objective: Objective) -> bool:
    window = objective.windows[len(objective.windows) // 2]
    x = objective.window(window)
    both, full = torch.cat([x, x / 2]), None
    while full is None:
        n = min(2, objective.window_batch)
        try:
            with torch.inference_mode():
                full, half = torch.cat([objective.run(part, [window] * n) for part in both.split(n)]).double()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            objective.shrink(n, error)
    spread = (full - full.mean()).abs().mean() + full.abs().mean()
    return bool((full - half).abs().mean() < 0.01 * spread)


def per_channel(values: Tensor, image: Tensor) -> Tensor:
    """Expand one value per channel (C,) to a volume like ``image`` (C, *spatial), as a view without extra memory."""
    return values.to(image.device, image.dtype).reshape(-1, *(1,) * (image.ndim - 1)).expand_as(image)


def noise_like(image: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Draw Gaussian noise (C, *spatial); ``std`` is in units of each channel's standard deviation.

    The numbers are drawn on the CPU in float32, so that they are equal for every device.
    """
    drawn = torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image.device, image.dtype)
    return drawn * per_channel(image.flatten(1).std(1) * std, image)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Blur each channel of (C, *spatial) over its spatial axes (edges repeated); ``sigma`` is in voxels."""
    from scipy.ndimage import gaussian_filter

    array = image.detach().cpu().numpy()
    blurred = np.stack([gaussian_filter(c, sigma, mode="nearest") for c in array])
    return torch.from_numpy(blurred).to(image.device, image.dtype)


def _load_volume(what: Any, objective: Objective) -> Tensor:
    image = objective.image
    if not isinstance(what, Tensor):
        if not Path(what).is_file():
            raise InputError(f"baseline file {Path(what).name} does not exist")
        from monai.transforms import LoadImage

        check_whole(what)
        what = LoadImage(image_only=True, ensure_channel_first=True)(what)
    volume = torch.as_tensor(what).as_subclass(Tensor).to(image.device, image.dtype)
    volume = volume[0] if volume.ndim == image.ndim + 1 and len(volume) == 1 else volume
    if volume.shape != image.shape:
        raise InputError(
            f"the baseline has shape {tuple(volume.shape)}, the image on the network's grid {tuple(image.shape)}: "
            "preprocess it like the image"
        )
    return volume


def describe_baseline(baseline: Baseline, values: Tensor) -> dict[str, Any]:
    """Return the record's entries for a baseline and the scores F there, (k,)."""
    return {"baseline": json_ready(baseline.record()), "baseline_value": [float(v) for v in values]}
