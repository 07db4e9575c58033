"""Memory that runs out: batches are halved wherever windows pass the network, and the last error names the remedy."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import EsegetaError
from esegeta_monai.methods import InputXGradient, IntegratedGradients, Occlusion
from esegeta_monai.targets import MultiClassMask

BATCH = 4
INFERER = SlidingWindowInferer((8, 8, 8), BATCH, 0.25)
METHODS = [InputXGradient(), IntegratedGradients(n_steps=2), Occlusion(window=8)]
ALLOCATOR = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


class Scarce(nn.Module):
    """A network that has memory for a few windows only.

    Args:
        fits: number of windows that fit.
        kind: the error: torch's on an accelerator, torch's on the CPU, Python's.
        where: every pass, or passes with a gradient ("gradient"), or their backward passes ("backward").
    """

    def __init__(self, fits: int = 1000, kind: str = "cuda", where: str = "every") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 1))
        self.fits, self.kind, self.where, self.largest = fits, kind, where, 0

    def error(self) -> BaseException:
        kinds = {"cuda": torch.OutOfMemoryError("CUDA out of memory"), "cpu": RuntimeError(ALLOCATOR)}
        return kinds.get(self.kind) or MemoryError("no room")

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.fits:
            if self.where == "every" or (self.where == "gradient" and x.requires_grad):
                raise self.error()
            if self.where == "backward" and x.requires_grad:
                x.register_hook(self.fail)
        self.largest = max(self.largest, len(x))
        return self.layers(x)

    def fail(self, gradient: Tensor) -> None:
        raise self.error()


def image() -> Tensor:
    return torch.rand(1, 1, 12, 12, 12, generator=torch.Generator().manual_seed(1))


def maps(network: nn.Module, **more: object) -> list[Tensor]:
    results = list(Explainer(network, INFERER, **more)(image(), METHODS, [MultiClassMask(1)]))
    assert [r.error for r in results] == [None] * len(METHODS)
    return [r.map.as_tensor() for r in results]


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    return maps(Scarce())


@pytest.mark.parametrize("where", ["every", "gradient", "backward"])
@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
@pytest.mark.parametrize("fits", [1, 2])
def test_batches_are_halved_and_the_maps_stay(expected: list[Tensor], fits: int, kind: str, where: str) -> None:
    """The prediction failed with torch's error, and Python's MemoryError ended the case."""
    for actual, wanted in zip(maps(Scarce(fits, kind, where)), expected):
        assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_smaller_batch_is_kept_and_recorded() -> None:
    (result,) = Explainer(Scarce(2), INFERER, checks=False)(image(), [InputXGradient()], [MultiClassMask(1)])
    assert result.record["window_batch"] == 2
    assert any("out of memory with 4 windows per batch" in text for text in result.record["warnings"])
    assert INFERER.sw_batch_size == BATCH


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_window_batch_reaches_the_prediction(expected: list[Tensor], batch: int) -> None:
    network = Scarce()
    actual = maps(network, window_batch=batch, checks=False)
    assert network.largest == batch
    for got, wanted in zip(actual, expected):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_automatic_baseline_obeys_the_window_batch() -> None:
    """Its probe took two windows, whatever the batch."""
    network = Scarce(1)
    explainer = Explainer(network, INFERER, window_batch=1, checks=False)
    (result,) = explainer(image(), [IntegratedGradients(n_steps=2, baseline="auto")], [MultiClassMask(1)])
    assert not any("out of memory" in text for text in result.record["warnings"])
    assert network.largest == 1


@pytest.mark.parametrize("kind", ["cuda", "cpu", "python"])
def test_the_last_error_names_the_remedy(kind: str) -> None:
    with pytest.raises(EsegetaError, match=r"out of memory with one window .*roi_size.*amp.*device='cpu'"):
        list(Explainer(Scarce(0, kind), INFERER)(image(), METHODS, [MultiClassMask(1)]))


def test_a_case_without_memory_does_not_decide_the_checks_of_the_next() -> None:
    """The checks of a network are made once; those of a case that did not run were kept for all others."""
    network = Scarce(0)
    explainer = Explainer(network, INFERER)
    with pytest.raises(EsegetaError):
        list(explainer(image(), [InputXGradient()], [MultiClassMask(1)]))
    network.fits = 1000
    (result,) = explainer(image(), [InputXGradient()], [MultiClassMask(1)])
    assert {c["check"]: c["verdict"] for c in result.record["checks"]}["determinism"] == "passed"
