"""Optimisation in 2D by other packages, if they are installed: torch-lucent and TorchRay.

Both receive a module whose output is F; windows, targets and layers remain those of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.synthesis.canvas import Canvas
from esegeta_monai.methods.synthesis.parametrisation import per_channel

__all__ = ["lucent_visualization", "torchray_masks"]

Climb = Callable[[Tensor], tuple[float, Tensor]]


class _Score(torch.autograd.Function):
    """F of images (m, C, *spatial): (m, 1), with the gradient of ``climb``."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, climb: Climb) -> Tensor:
        climbed = [climb(image) for image in images]
        ctx.save_for_backward(torch.stack([gradient.to(images) for _, gradient in climbed]))
        return images.new_tensor([value for value, _ in climbed])[:, None]

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * slope.reshape(-1, *(1,) * (gradient.ndim - 1)), None


class _Scene(nn.Module):
    """F as a module without the network as a submodule, since these packages leave hooks on modules."""

    def __init__(self, climb: Climb, prepare: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.climb, self.prepare, self.score = climb, prepare, nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Map images (m, C, h, w) to F (m, 1)."""
        images = images if self.prepare is None else torch.stack([self.prepare(image) for image in images])
        return self.score(_Score.apply(images, self.climb))


def lucent_visualization(
    canvas: Canvas, intensity: Tensor, parametrisation: str, n_iter: int, lr: float, decay: float | None
) -> tuple[Tensor, Tensor, list[float]]:
    """Run `FeatureVisualization` by ``lucent.optvis.render.render_vis``, with its parametrisation and transforms.

    Returns:
        The image at the start and at the end (C, h, w), and F at each step.

    Raises:
        UsageError: torch-lucent is not installed.
        MethodError: the canvas is not 2D.
    """
    shape = canvas.image.shape
    flat_only("lucent", shape)
    try:
        from lucent.optvis import objectives, param, render
    except ImportError as error:
        raise UsageError(_missing("lucent", "torch-lucent", error)) from error
    low, high = (per_channel(intensity[:, i], canvas.image) for i in (0, 1))
    curve: list[float] = []

    def climb(image: Tensor) -> tuple[float, Tensor]:
        value, gradient = canvas.climb(image.to(canvas.image))
        curve.append(value)
        return value, gradient

    def ranged(image: Tensor) -> Tensor:
        return low + (high - low) * image.to(canvas.image)

    images: list[Tensor] = []

    def parameters() -> tuple[list[Tensor], Callable[[], Tensor]]:
        size = (1, *shape)
        if parametrisation == "voxel":
            numbers, image = param.spatial.pixel_image(size)
        else:
            numbers, image = param.spatial.fft_image(size, decay_power=1 if decay is None else decay)

        def unit() -> Tensor:
            drawn = torch.sigmoid(image())
            images[1:] = [drawn.detach()[0]]
            return drawn

        images.append(torch.sigmoid(image()).detach()[0])
        return numbers, unit

    with _seeded(canvas.objective.seed), torch.enable_grad():
        render.render_vis(
            _Scene(climb, ranged),
            objectives.Objective(lambda layer: -layer("score").mean()),
            parameters,
            optimizer=lambda numbers: torch.optim.Adam(numbers, lr=lr),
            thresholds=(n_iter,),
            preprocess=False,
            progress=False,
            show_image=False,
            fixed_image_size=tuple(shape[1:]),
        )
    start, end = (ranged(image) for image in images)
    return start, end, curve


def torchray_masks(
    image: Tensor,
    climb: Climb,
    areas: Sequence[float],
    variant: str,
    n_iter: int,
    blurred: bool,
    seed: int,
    **options: Any,
) -> Tensor:
    """Return the masks (areas, h, w) of ``torchray.attribution.extremal_perturbation`` for F.

    Args:
        image: (C, h, w).
        climb: function from an image to F, in units of ``F(x) − F(x₀)``, and its gradient.
        blurred: True for TorchRay's blur, False for its fade to zero.
        options: ``step`` and ``sigma`` of the masks.

    Raises:
        UsageError: TorchRay is not installed.
        MethodError: the image is not 2D.
    """
    flat_only("torchray", image.shape)
    try:
        from torchray.attribution import extremal_perturbation as peer
    except ImportError as error:
        raise UsageError(_missing("torchray", "torchray", error)) from error

    def reward(activation: Tensor, target: int, variant: str) -> Tensor:
        value = activation[:, target]
        return -value if variant == peer.DELETE_VARIANT else value

    with _seeded(seed), torch.enable_grad():
        masks, _ = peer.extremal_perturbation(
            _Scene(climb),
            image[None].float(),
            0,
            areas=list(areas),
            perturbation=peer.BLUR_PERTURBATION if blurred else peer.FADE_PERTURBATION,
            max_iter=n_iter,
            jitter=False,  # it would flip the image under a frozen mask
            variant=peer.PRESERVE_VARIANT if variant == "preserve" else peer.DELETE_VARIANT,
            reward_func=reward,
            resize=True,
            **options,
        )
    return masks.detach()[:, 0].to(image)


def flat_only(backend: str, shape: Sequence[int]) -> None:
    """Check that an image (C, *spatial) is 2D.

    Raises:
        MethodError: the image is not 2D.
    """
    if len(shape) != 3:
        raise MethodError(f"backend={backend!r} is for 2D images only: omit it, the native backend is for 2D and 3D")


def _missing(backend: str, package: str, error: ImportError) -> str:
    return (
        f"backend={backend!r} needs {package}, which cannot be imported ({error}): install it with 'pip install "
        f"esegeta-monai[{backend}]' (this installs torchvision, whose version must match torch), or omit backend"
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random generators of torch and NumPy, and restore them afterwards."""
    state = np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(state)
