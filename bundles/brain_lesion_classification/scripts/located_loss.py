"""The training loss of the classifier."""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool3d, binary_cross_entropy_with_logits, cross_entropy

__all__ = ["LocatedLoss"]


class LocatedLoss(torch.nn.Module):
    r"""Cross entropy of the image's class, and of the place of the lesion in the last feature maps.

    A lesion is a thousandth of the volume, so that the class alone, through global average pooling, teaches slowly. The
    last convolution's outputs :math:`z_k` before their ReLU are therefore trained to be positive in the lesion as well:

    .. math:: L = CE(\mathrm{logits}, y)
        + \lambda\; BCE_w(\log \sum_k e^{z_k} + \log w, \mathrm{lesion\ mask})

    A voxel of a lesion weighs :math:`w` times as much as another, and the shift by :math:`\log w` takes that weight out
    of :math:`z` again: it stays near the true odds, so that the ReLU leaves little but lesions.

    Args:
        network: a forward hook listens to its `features[-1].conv`; nothing else is changed.
        location: :math:`\lambda`; 0 trains by the class alone.
        positive: :math:`w`.
    """

    def __init__(self, network: torch.nn.Module, location: float = 30.0, positive: float = 300.0) -> None:
        super().__init__()
        self.location, self.positive = location, torch.tensor(positive)
        self._maps: torch.Tensor | None = None
        last = max(int(name) for name, _ in network.get_submodule("features").named_children())
        network.get_submodule(f"features.{last}.conv").register_forward_hook(self._listen)

    def _listen(self, module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        self._maps = output

    def forward(self, logits: torch.Tensor, lesion: torch.Tensor) -> torch.Tensor:
        """Logits (B, 2) and lesion masks (B, 1, *spatial); a head without a lesion has an empty mask."""
        if self._maps is None:
            raise RuntimeError("LocatedLoss saw no forward pass of its network")
        label = lesion.flatten(1).any(dim=1).long()
        where = (avg_pool3d(lesion, [n // m for n, m in zip(lesion.shape[2:], self._maps.shape[2:])]) > 0.25).float()
        weight = self.positive.to(where)
        odds = self._maps.logsumexp(dim=1, keepdim=True) + weight.log()
        place = binary_cross_entropy_with_logits(odds, where, pos_weight=weight)
        return cross_entropy(logits, label) + self.location * place
