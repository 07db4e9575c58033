"""Two networks as one, whose outputs are compared by the target `esegeta_monai.targets.Difference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.errors import NetworkError
from esegeta_monai.utils.tensors import copied

__all__ = ["NetworkPair"]


class NetworkPair(nn.Module):
    """Two networks that see the same input, such as two folds, two epochs or two architectures.

    Its output (n, 2 K, …) has the channels of ``first``, then those of ``second``. Explain it by the target
    `esegeta_monai.targets.Difference`, which freezes the mask of the first network: what do the two see differently?
    Methods of layers are refused, because a layer belongs to one of the two.

    Args:
        first: the network with whose prediction masks are made.
        second: the other network, of the same outputs (n, K, …).

    Raises:
        NetworkError: in a pass, the outputs are no tensors of one shape.

    Example:
        >>> from esegeta_monai import Explainer
        >>> from esegeta_monai.targets import Difference
        >>> first, second = (nn.Sequential(nn.Flatten(), nn.Linear(16, 2)) for _ in range(2))
        >>> explainer = Explainer(NetworkPair(first, second))
        >>> attribution, = explainer(torch.rand(1, 1, 4, 4), ["InputXGradient"], [Difference("ClassScore(1)")])
        >>> attribution.status
        'ok'
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return both outputs (n, 2 K, …) for x (n, C, *spatial); further arguments are given to both networks."""
        # a network may write into what it gets
        a = self.first(x.clone(), *copied(args), **copied(kwargs))
        b = self.second(x, *args, **kwargs)
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            raise NetworkError(
                "a network of the pair returns several outputs: wrap it so that it returns the one to compare"
            )
        if a.shape != b.shape:
            raise NetworkError(
                f"the networks of the pair return {tuple(a.shape)} and {tuple(b.shape)}: only outputs of one shape can "
                "be compared"
            )
        return torch.cat([a, b], 1)
