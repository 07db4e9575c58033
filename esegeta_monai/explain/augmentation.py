"""MONAI's test-time augmentation with its drawn transforms frozen, as views round the volume."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from monai.data import MetaTensor
from monai.data.test_time_augmentation import TestTimeAugmentation
from monai.inferers.utils import sliding_window_inference
from monai.transforms import Compose, Randomizable
from torch import Tensor, nn

from esegeta_monai.engine.windows.plan import Call
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer

__all__ = ["FrozenAugmentation", "freeze_augmentation"]


@dataclass(frozen=True)
class FrozenAugmentation:
    """A case with the views that a test-time augmentation has drawn for it.

    Attributes:
        image: the image (C, *spatial) after the transforms before the first random one.
        inferer: the mean over the views, for `esegeta_monai.Explainer`.
        network: the network, where ``inferrer_fn`` shows it; else None.
    """

    image: MetaTensor
    inferer: EnsembleInferer
    network: nn.Module | None


def freeze_augmentation(
    augmentation: TestTimeAugmentation, data: Mapping[str, Any], num_examples: int = 10, inferer: Any = None
) -> FrozenAugmentation:
    """Draw the transforms of a test-time augmentation once and keep them, so that its mean is a fixed function.

    MONAI's own loop draws; `monai.utils.set_determinism` makes it draw the same again. Each drawn transform must only
    mirror the image or exchange its axes (flips, rotations by 90°): such a view and its inverse are exact, and so are
    all maps of the mean. It is checked against the transformed image, bit by bit.

    Args:
        augmentation: `monai.data.TestTimeAugmentation`.
        data: the data dictionary of one case, as the augmentation takes it.
        num_examples: how many transforms are drawn, a multiple of its ``batch_size``.
        inferer: the inferer inside ``inferrer_fn``; None: it is read from a module, or from
            ``functools.partial(sliding_window_inference, predictor=network, …)``.

    Raises:
        UsageError: a transform that interpolates or changes intensities, a ``post_func``, views of different shapes in
            one batch, or an ``inferrer_fn`` that is not understood; the message names the way out.

    Example:
        >>> from monai.transforms import RandFlipd
        >>> network = nn.Conv2d(1, 2, 3, padding=1).eval()
        >>> augmentation = TestTimeAugmentation(RandFlipd("image", prob=0.5), 1, inferrer_fn=network, orig_key="image")
        >>> case = freeze_augmentation(augmentation, {"image": MetaTensor(torch.rand(1, 6, 6))}, num_examples=4)
        >>> sum(view.weight for view in case.inferer.views)
        1.0
    """
    network, inner = _prediction_of(augmentation.inferrer_fn, inferer)
    transforms = _steps(augmentation.transform)
    random = [type(t).__name__ for t in transforms if isinstance(t, Randomizable)]
    first = next((i for i, t in enumerate(transforms) if isinstance(t, Randomizable)), len(transforms))
    key = augmentation.image_key
    prepared: Any = copy.deepcopy(dict(data))
    for transform in transforms[:first]:
        prepared = transform(prepared)
    image = prepared[key]
    if not isinstance(image, MetaTensor):
        raise UsageError(f"{key!r} has no metadata before the random transforms, which shows what they do: track_meta")
    views: Counter[Call] = Counter()

    def record(batch: MetaTensor) -> Tensor:
        views.update(_view(image, cast(MetaTensor, batch[i].cpu()), random) for i in range(len(batch)))
        return batch

    probe = copy.copy(augmentation)
    probe.inferrer_fn, probe.progress, probe.return_full_data = record, False, True
    probe.device = torch.device("cpu")
    back = probe(copy.deepcopy(dict(data)), num_examples)
    whole = torch.as_tensor(image).as_subclass(Tensor)
    if augmentation.apply_inverse_to_pred and any(not torch.equal(_plain(b), whole) for b in back):
        raise UsageError(
            "the inverse of the drawn transforms, or post_func, does not give the image back unchanged: leave "
            "post_func out (the mean of raw outputs is explained), and give orig_key the key of the image"
        )
    calls = [replace(view, weight=count / num_examples) for view, count in views.items()]
    return FrozenAugmentation(image, EnsembleInferer(inner, views=calls, around=True), network)


def _steps(transform: Any) -> list[Any]:
    """Return the transforms of nested `Compose`, which as a new `Compose` would get other random states."""
    return [step for t in transform.transforms for step in _steps(t)] if type(transform) is Compose else [transform]


def _prediction_of(function: Any, inferer: Any) -> tuple[nn.Module | None, Any]:
    """Return the network inside ``inferrer_fn``, None if it is not known, and its inferer."""
    if inferer is not None:
        return (function if isinstance(function, nn.Module) else None), inferer
    if isinstance(function, nn.Module):
        return function, None
    if isinstance(function, functools.partial) and function.func is sliding_window_inference and not function.args:
        options = dict(function.keywords)
        network = options.pop("predictor", None)
        if isinstance(network, nn.Module):
            return network, functools.partial(sliding_window_inference, **options)
    raise UsageError(
        "inferrer_fn is no module and no functools.partial(sliding_window_inference, predictor=network, ...): name the "
        "inferer that it uses, freeze_augmentation(..., inferer=SlidingWindowInferer(...)), or SimpleInferer()"
    )


def _plain(values: Any) -> Tensor:
    return torch.as_tensor(values).as_subclass(Tensor)


def _view(image: MetaTensor, drawn: MetaTensor, random: list[str]) -> Call:
    """Return the view that turns ``image`` (C, *spatial) into ``drawn`` (C, *spatial).

    Raises:
        UsageError: it is no exchange and mirroring of axes.
    """
    dims = image.ndim - 1
    change = (torch.linalg.inv(image.affine.double().cpu()) @ drawn.affine.double().cpu())[:dims, :dims]
    whole = change.round()
    exact = torch.allclose(change, whole, atol=1e-4) and bool((whole.abs().sum(0) == 1).all())
    if exact and bool((whole.abs().sum(1) == 1).all()):
        axes = tuple(int(whole[:, new].abs().argmax()) for new in range(dims))
        flips = tuple(new for new in range(dims) if whole[axes[new], new] < 0)
        view = Call(flips=flips, axes=() if axes == tuple(range(dims)) else axes, around=True)
        turned = view.apply(_plain(image), dims)
        if turned.shape == drawn.shape and torch.equal(turned, _plain(drawn)):
            return view
        if turned.shape != drawn.shape:
            raise UsageError(
                f"views of the shapes {tuple(turned.shape[1:])} and {tuple(drawn.shape[1:])} are padded together in "
                "one batch: give TestTimeAugmentation batch_size=1"
            )
    raise UsageError(
        f"the drawn transforms ({', '.join(random)}) do more than to mirror the image or turn it by 90°, so that no "
        "exact inverse exists: use RandFlipd, RandAxisFlipd and RandRotate90d, or explain one network without them"
    )
