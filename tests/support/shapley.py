"""Classification networks whose every feature interacts with every other, and exact enumeration."""

from __future__ import annotations

import math

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from esegeta_monai.targets import ClassScore, Target
from tests.support.objectives import Naive


class Quadratic(nn.Module):
    """Two outputs, tanh of two layers: no term is additive."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(inputs)
        self.a = nn.Linear(inputs, 10).double()
        self.b = nn.Linear(10, 2).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x.flatten(1)) / 3
        return self.b(torch.tanh(h) + h * h)


def case_of(net: nn.Module, image: Tensor, target: Target | None = None) -> Naive:
    case = Naive(net, image, [target or ClassScore(1)], SimpleInferer())
    case.objective.context.window_batch = 64
    return case


def enumerated(case: Naive, labels: Tensor, n: int, baseline: Tensor) -> Tensor:
    """Shapley values (k, n) by their definition, over all subsets; labels (1 or C, *spatial) of 0 … n − 1."""
    values = {}
    for s in range(2**n):
        kept = torch.tensor([(s >> j) & 1 for j in range(n)], dtype=torch.bool)
        values[s] = case.value(torch.where(kept[labels], case.image, baseline))
    phi = torch.zeros(len(case.scores), n, dtype=torch.float64)
    for j in range(n):
        for s in range(2**n):
            if not (s >> j) & 1:
                size = s.bit_count()
                weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                phi[:, j] += weight * (values[s | 1 << j] - values[s])
    return phi
