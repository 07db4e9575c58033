"""Evaluations of a linear network."""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.targets import ClassScore

METRICS = [
    "RelevanceMass",
    "Deletion(features='grid(size=2)', baseline='zero')",
    "Infidelity(n_samples=20, baseline='zero')",
    "Sparseness",
]


class Linear(nn.Module):
    """Class 1 is ``w · x`` with w in one corner, so that the cause is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.zeros(8, 8, dtype=torch.float64)
        self.w[:4, :4] = torch.linspace(1, 2, 16, dtype=torch.float64).reshape(4, 4)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        score = (x[:, 0] * self.w).sum((1, 2))
        return torch.stack([-score, score], 1)


ONE = (ClassScore(1),)


def judged(methods=("InputXGradient",), metrics=METRICS, targets=ONE, **more):
    image = MetaTensor(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5)
    label = torch.zeros(8, 8)
    label[:4, :4] = 1
    evaluator = Evaluator(
        Explainer(Linear(), on_error="record"), list(metrics), with_controls=more.pop("controls", True)
    )
    return evaluator(image, list(methods), list(targets), label=label, **more)
