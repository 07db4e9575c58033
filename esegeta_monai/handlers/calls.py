"""Record what an engine passes to its inferer, before the network can change it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esegeta_monai.utils.tensors import copied

__all__ = ["InfererCalls", "plain_inferer", "watched"]


class InfererCalls:
    """A wrapper of an engine's inferer that stores the further arguments of the last call, and the images.

    Evaluators such as that of VISTA3D pass prompts to the inferer that ``prepare_batch`` does not return. Networks may
    write into their input, and an inferer passes them views of the engine's images: explained are the images before.

    >>> calls = InfererCalls(lambda inputs, network, **more: network(inputs))
    >>> calls(1, network=abs, prompt=3), calls.args, calls.kwargs
    (1, (), {'prompt': 3})
    >>> image = torch.ones(2)
    >>> calls(image, lambda x: x.mul_(3)), calls.before(image)
    (tensor([3., 3.]), tensor([1., 1.]))
    """

    def __init__(self, inferer: Any) -> None:
        self.inferer = inferer
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self._images: tuple[Any, Any] = (None, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        images = args[0] if args else kwargs.get("inputs")
        copies = copied(images)
        self.args = copied(tuple(args[2:]))
        self.kwargs = {k: copied(v) for k, v in kwargs.items() if k not in ("inputs", "network")}
        out = self.inferer(*args, **kwargs)
        self._images = (images, copies)
        return out

    def before(self, images: Any) -> Any:
        """Return the images as they were before the inferer got them in its last call.

        Args:
            images: a tensor or a list of tensors; others than those that the inferer got are returned as they are.
        """
        given, copies = self._images
        return _restored(images, given, copies)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inferer, name)


def _restored(images: Any, given: Any, copies: Any) -> Any:
    if isinstance(images, (list, tuple)) and isinstance(given, (list, tuple)) and len(images) == len(given):
        return [_restored(*entries) for entries in zip(images, given, copies)]
    if not isinstance(images, Tensor) or not isinstance(given, Tensor) or images.shape != given.shape:
        return images
    if images.data_ptr() != given.data_ptr() or torch.equal(images, copies):
        return images
    return images.clone().copy_(copies)


def plain_inferer(engine: Any) -> Any:
    """Return the engine's own inferer, without `InfererCalls`."""
    inferer = engine.inferer
    return inferer.inferer if isinstance(inferer, InfererCalls) else inferer


def watched(engine: Any) -> InfererCalls:
    """Wrap the inferer of an engine in `InfererCalls`, once for all its handlers, and return the wrapper."""
    if not isinstance(engine.inferer, InfererCalls):
        engine.inferer = InfererCalls(engine.inferer)
    return engine.inferer
