"""Settings of the process after a call from Python."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet

from esegeta_monai import Explainer
from tests.faults.group_6_networks import GROUP
from tests.faults.nifti import ball
from tests.faults.runner import Row, command

METHODS, TARGETS = "Saliency,Rise(n_masks=8),SmoothGrad(n_samples=2),Occlusion(window=16)", "MultiClassMask(1)"


def _network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return UNet(3, 1, 3, [4, 8], [2], dropout=0.1)


def _explain(network: torch.nn.Module) -> list[Any]:
    image = torch.from_numpy(ball((24, 24, 24)))[None, None].to(torch.get_default_dtype())
    inferer = SlidingWindowInferer((16, 16, 16), 2, 0.25)
    return list(Explainer(network, inferer)(image, METHODS, TARGETS))


def _state() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "torch's random numbers": torch.get_rng_state().sum().item(),
        "numpy's random numbers": repr(np.random.get_state()),
        "Python's random numbers": random.getstate(),
        "warning filters": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32),
        "working folder": os.getcwd(),
        "environment": dict(os.environ),
    }


def _unchanged(folder: Path) -> str:
    """The process and the network are as before: also the modules' training flags, which are mixed here."""

    def explain() -> None:
        network = _network().train()
        next(iter(network.children())).eval()
        flags = [m.training for m in network.modules()]
        _explain(network)  # the first call may import
        before = _state()
        results = _explain(network)
        after = _state()
        assert all(result.map is not None for result in results), [result.error for result in results]
        assert [name for name in before if before[name] != after[name]] == []
        assert [m.training for m in network.modules()] == flags
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
        print(len(results), "maps,", len(before), "settings")

    done = command(code=explain)
    assert done.code == 0, done.err[-800:]
    return done.out.strip()


def _float64(folder: Path) -> str:
    """Everything in float64, as a program may ask of torch."""

    def explain() -> None:
        torch.set_default_dtype(torch.float64)
        results = _explain(_network().double())
        assert all(result.map is not None for result in results), [result.error for result in results]
        assert torch.get_default_dtype() == torch.float64
        print(len(results), "maps")

    done = command(code=explain)
    assert done.code == 0, done.err[-800:]
    return done.out.strip()


ROWS = [
    Row(GROUP, "a call from Python leaves the process as it was", _unchanged),
    Row(GROUP, "a call from Python under the default dtype float64", _float64),
]
