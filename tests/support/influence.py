"""Small trainings whose influences are known, for tests and for benchmarks/known_answers.py."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.explain.influence import Checkpoint, ExplainedCase, Influence, TracIn, Trak, influence
from esegeta_monai.explain.training_loss import TrainingCase, TrainingLoss

SIZE = 8


def half_squared(out: Tensor, label: Tensor) -> Tensor:
    return 0.5 * (out - label.to(out)).square().sum()


def spots(count: int, dims: int, flipped: float, seed: int) -> tuple[list[TrainingCase], np.ndarray]:
    """Noise images with a spot in the first half (class 0) or the second (class 1); some labels are flipped.

    Returns:
        The cases, and which are flipped (n,).
    """
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 2, count)
    wrong = np.zeros(count, dtype=bool)
    wrong[rng.choice(count, round(flipped * count), replace=False)] = True
    cases = []
    for n, (k, other) in enumerate(zip(classes, wrong)):
        image = rng.normal(0, 1, (SIZE,) * dims)
        at = rng.integers(1, SIZE - 1, dims)
        at[0] = rng.integers(1, SIZE // 2 - 1) + (SIZE // 2 if k else 0)
        image[tuple(slice(i - 1, i + 2) for i in at)] += 2.5
        label = torch.tensor(int(k) ^ int(other))
        cases.append(TrainingCase(f"case {n}", torch.from_numpy(image[None]).float(), label))
    return cases, wrong


def classifier(dims: int) -> nn.Module:
    conv, pool = (nn.Conv2d, nn.AvgPool2d) if dims == 2 else (nn.Conv3d, nn.AvgPool3d)
    width = 4 * (SIZE // 2) ** dims
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), pool(2), nn.Flatten(), nn.Linear(width, 2))


def trained(
    network: nn.Module, cases: Sequence[TrainingCase], epochs: int, rate: float, batch: int, keep: Sequence[int]
) -> list[Checkpoint]:
    """Train by plain SGD on cross-entropy; return the weights after the epochs in ``keep``."""
    images, labels = torch.stack([c.image for c in cases]), torch.stack([c.label for c in cases])
    optimizer = torch.optim.SGD(network.parameters(), rate)
    generator = torch.Generator().manual_seed(0)
    checkpoints = []
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(cases), generator=generator).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
        if epoch in keep:
            weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
            checkpoints.append(Checkpoint(weights, rate, f"epoch {epoch}"))
    return checkpoints


def flipped_labels(dims: int, method: TracIn | Trak | None = None, seed: int = 0) -> tuple[Influence, np.ndarray]:
    """Train on 200 cases, 5 % with the wrong label; return the influences on one more case, and the flips."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = classifier(dims)
    cases, wrong = spots(200, dims, 0.05, seed)
    checkpoints = trained(network, cases, 8, 0.05, 10, (4, 8))
    (asked,) = spots(1, dims, 0.0, seed + 1000)[0]
    explained = ExplainedCase("test", asked.image[None], [f"ClassScore({int(asked.label)})"])
    explainer = Explainer(network.eval(), checks=False)
    return influence(explainer, [explained], cases, TrainingLoss(nn.CrossEntropyLoss()), checkpoints, method), wrong


def auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs (positive, other) in which the positive has the larger value; ties count one half."""
    a, b = values[positive][:, None], values[~positive][None]
    return float((a > b).mean() + 0.5 * (a == b).mean())
