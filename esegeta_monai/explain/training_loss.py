"""The training loss of a case and its gradient with respect to the weights, on fixed patches of the training's size."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data.utils import dense_patch_slices
from monai.transforms import SpatialPad
from monai.utils import fall_back_tuple
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.parameter_gradients import flat, tracked
from esegeta_monai.errors import InputError, NetworkError, UsageError

__all__ = ["TrainingCase", "TrainingLoss"]


@dataclass(frozen=True)
class TrainingCase:
    """A case of the training set, preprocessed as in the training, without augmentation.

    Attributes:
        name: its name.
        image: (C, *spatial).
        label: what the loss compares the output with: a map (L, *spatial), the number of a class (), or a vector (K,).
    """

    name: str
    image: Tensor
    label: Tensor

    def __post_init__(self) -> None:
        if self.image.ndim not in (3, 4):
            raise InputError(f"{self.name}: the image has the shape {tuple(self.image.shape)}: give (C, *spatial)")
        if self.is_map and self.label.shape[1:] != self.image.shape[1:]:
            raise InputError(
                f"{self.name}: the label has the shape {tuple(self.label.shape)}, the image "
                f"{tuple(self.image.shape)}: give both on one grid"
            )

    @property
    def is_map(self) -> bool:
        """True if the label is a map, not a class or a vector."""
        return self.label.ndim > 1


@dataclass(frozen=True)
class TrainingLoss:
    """The loss of a case: the mean of the training's loss over fixed patches, each passed to the network alone.

    Patches lie on a regular grid without overlap, the last one of an axis at its end; smaller images are padded with
    zeros. If there are more than ``patches``, as many are drawn, by the seed and the name of the case, so that a case
    has the same patches at all checkpoints. A loss that is computed of a batch (Dice with ``batch=True``) sees one
    patch at a time. The network is in evaluation mode: no dropout, the stored statistics of batch norm.

    Args:
        function: loss of output (1, K, *patch) or (1, K) and label (1, L, *patch), (1,) or (1, K), a scalar.
        patch_size: patch of the training in voxels, -1 for the whole axis; None: the whole image. Cases whose label is
            no map are passed whole.
        patches: most patches of a case.
        seed: of the choice of patches.

    Raises:
        UsageError: ``patches`` is below 1.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    patch_size: Sequence[int] | None = None
    patches: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.patches < 1:
            raise UsageError(f"patches={self.patches}: a loss needs at least one patch")

    def pieces(self, case: TrainingCase, slice_axis: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return the patches of a case: images (1, C, *patch) with their labels.

        Args:
            case: the case.
            slice_axis: spatial axis along which a 2D network sees single slices of a 3D image; None: none.

        Raises:
            UsageError: the patch has another number of axes than the image.
        """
        image, label = (t.as_subclass(Tensor) for t in (case.image, case.label))
        if not case.is_map:
            return [(image[None], label[None])]
        dims = image.ndim - 1
        given = (-1,) * dims if self.patch_size is None else tuple(self.patch_size)
        if len(given) != dims:
            raise UsageError(
                f"a patch of {given} does not fit {case.name} of {tuple(image.shape[1:])}: give {dims} axes"
            )
        size = list(fall_back_tuple(given, image.shape[1:], lambda n: n is not None and n > 0))
        if slice_axis is not None:
            size[slice_axis] = 1
        pad = SpatialPad(size)
        image, label = (torch.as_tensor(pad(t)).as_subclass(Tensor) for t in (image, label))
        places = dense_patch_slices(image.shape[1:], size, size)
        if len(places) > self.patches:
            rng = np.random.default_rng([self.seed, zlib.crc32(case.name.encode())])
            places = [places[i] for i in sorted(rng.choice(len(places), self.patches, replace=False))]
        indices = [(None, slice(None), *place) for place in places]
        return [(image[at], label[at]) for at in indices]

    def gradient(
        self, model: Model, parameters: Sequence[nn.Parameter], case: TrainingCase, slice_axis: int | None = None
    ) -> tuple[float, Tensor]:
        """Compute the loss of a case and ``∂ℓ/∂θ`` (D,).

        Args:
            model: the network, frozen.
            parameters: weights of the network.
            case: the case.
            slice_axis: see `pieces`.

        Raises:
            NetworkError: the loss is no finite scalar, or cannot be differentiated.
            InputError: the loss cannot compare output and label.
        """
        whole = copy.copy(model)
        whole.inferer = None
        pieces = self.pieces(case, slice_axis)
        total, value = torch.zeros(()), 0.0
        for number, (image, label) in enumerate(pieces):
            x = image.to(model.device, model.dtype)
            with tracked(parameters), torch.enable_grad():
                out = whole(x, slice_axis=slice_axis)
                loss = self._compared(case, out, label.to(model.device), slice_axis) / len(pieces)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            one = flat(gradients, parameters)
            total = one if not number else total.add_(one)
            value += float(loss.detach())
        return value, total

    def _compared(self, case: TrainingCase, out: Tensor, label: Tensor, slice_axis: int | None) -> Tensor:
        if slice_axis is not None:
            out, label = out.squeeze(slice_axis + 2), label.squeeze(slice_axis + 2)
        try:
            loss = self.function(out, label)
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
            raise InputError(
                f"{case.name}: the loss cannot compare an output of {tuple(out.shape)} with a label of "
                f"{tuple(label.shape)} ({label.dtype}): {' '.join(str(error).split())[:200]}; give labels as in the "
                "training"
            ) from error
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not bool(torch.isfinite(loss).all()):
            raise NetworkError(f"{case.name}: the loss is no finite scalar: give the reduced loss of the training")
        if not loss.requires_grad:
            raise NetworkError(f"{case.name}: the loss does not depend on the weights: give a differentiable loss")
        return loss.reshape(())
