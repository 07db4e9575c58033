"""The three networks with a known cause, and cases unseen in training."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "brain_lesion_classification"
sys.path.insert(0, str(BUNDLE))

from scripts.anatomy import template_case  # noqa: E402
from scripts.lesions import LesionCases  # noqa: E402

__all__ = ["BUNDLE", "CAUSES", "Cause", "Example"]

FIRST_SEED, OTHER_SEEDS = 5_000_000, 6_000_000
"""First seeds of the examples and of further cases for methods; training and validation used seeds below
2,000,000."""


@dataclass
class Example:
    """A case that the network classifies as lesion.

    Attributes:
        seed: seed of the case.
        image: (1, *spatial).
        truth: bool (1, *spatial): the voxels of the cause.
        other: bool (1, *spatial): the object that a map should not highlight (see `Cause.other`); may be empty.
    """

    seed: int
    image: Tensor
    truth: Tensor
    other: Tensor


@dataclass
class Cause:
    """A trained network and the cause of its answer "lesion", as proved by `interventions`.

    Attributes:
        name: name of the network.
        weights: file in the bundle's `models`.
        options: options of `LesionCases`: objects planted besides lesions.
        truth: the object that the network uses.
        other: the object that it does not use.
    """

    name: str
    weights: str
    options: dict[str, Any] = field(default_factory=dict)
    truth: str = "lesion"
    other: str | None = None
    folder: Path = ROOT / "build" / "known_cause"

    @cached_property
    def network(self) -> nn.Module:
        parser = ConfigParser(json.loads((BUNDLE / "configs" / "inference.json").read_text(encoding="utf-8")))
        network = parser.get_parsed_content("network_def").eval()
        state = torch.load(BUNDLE / "models" / self.weights, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
        return network

    def cases(self, seeds: range) -> LesionCases:
        return LesionCases(template_case(self.folder / "mni152"), seeds, **self.options)

    def margin(self, image: Tensor) -> float:
        """Return the logit of "lesion" minus that of "none" for an image (1, *spatial)."""
        with torch.no_grad():
            none, lesion = self.network(image[None].as_subclass(torch.Tensor))[0].tolist()
        return lesion - none

    def examples(self, n: int, first_seed: int = FIRST_SEED) -> Iterator[Example]:
        """Yield the first ``n`` cases from ``first_seed`` on with all objects and the prediction "lesion"."""
        cases = self.cases(range(first_seed, first_seed + 20 * n))
        count = 0
        for index in range(len(cases)):
            case = cases[index]
            shown = [self.truth, *([self.other] if self.other else [])]
            if not case["label"] or not all(case[key].any() for key in shown):
                continue
            image = case["image"].as_tensor()
            if self.margin(image) <= 0:
                continue
            truth = case[self.truth].as_tensor() > 0
            other = case[self.other].as_tensor() > 0 if self.other else torch.zeros_like(truth)
            yield Example(case["seed"], image, truth, other)
            count += 1
            if count == n:
                return
        raise RuntimeError(f"{self.name}: {count} of {n} cases found in {len(cases)} seeds from {first_seed}")

    def others(self, label: int, n: int = 4) -> list[Tensor]:
        """Return the first ``n`` images of a label, for methods that need other cases."""
        cases = self.cases(range(OTHER_SEEDS, OTHER_SEEDS + 20 * n))
        images = (
            case["image"].as_tensor() for case in map(cases.__getitem__, range(len(cases))) if case["label"] == label
        )
        return list(itertools.islice(images, n))


CAUSES = [
    Cause("lesion", "model.pt"),
    Cause("shortcut", "model_shortcut.pt", {"shortcut": 1.0}, truth="shortcut", other="lesion"),
    Cause("distractor", "model_distractor.pt", {"distractor": True}, other="distractor"),
]
