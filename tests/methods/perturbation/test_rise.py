"""RISE against its formula, and on an image whose cause is known."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai.engine.baselines import Zero
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import Rise, run
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import Computed, small
from tests.support.objectives import Naive, whole_mask
from tests.support.tensors import assert_equal, noise


@pytest.mark.parametrize("shape", [(6, 20), (6, 10, 9)])
def test_formula(shape):
    """Petsiuk et al., equation 6, mask by mask on the whole volume."""
    dims = len(shape)
    case = Naive(small(dims, 2), noise(2, *shape), [MultiClassMask(1, output="probability"), MultiClassMask(2)])
    method = Rise(n_masks=9, grid=3, p=0.4, baseline="zero")
    masks = method.masks(case.objective, Zero().draw(case.objective, case.objective.generator()))
    expected = torch.zeros(2, *shape, dtype=torch.float64)
    for i in range(9):
        mask = whole_mask(masks, i)
        expected += case.value(case.image * mask).reshape(-1, *(1,) * dims) * mask
    with frozen(case.net):
        result = run(method, case.objective)
    assert_equal(result.maps[:, 0], expected / (9 * 0.4))


def test_masks_are_petsiuks():
    """Values in [0, 1], p of them kept on average, moved by up to a cell: sides ⌈n/g⌉, stretched over g + 1 of them."""
    case = Naive(small(), noise(1, 21, 30))
    masks = Rise(n_masks=400, grid=4, p=0.3).masks(case.objective, case.image)
    assert masks.extent == (5 * 6, 5 * 8)
    assert masks.shifts.amin(0).tolist() == [0, 0]
    assert masks.shifts.amax(0).tolist() == [5, 7]
    whole = torch.stack([masks.mask(i, (slice(0, 21), slice(0, 30))) for i in range(400)])
    assert 0 <= float(whole.min()) <= float(whole.max()) <= 1
    assert float(whole.mean()) == pytest.approx(0.3, abs=0.02)
    assert float((whole.mean(0) - 0.3).abs().max()) < 0.1


def blob(x: torch.Tensor) -> torch.Tensor:
    """One logit per voxel: how bright the image is round a fixed place."""
    lit = x[:, :, 3:7, 10:14].mean((2, 3), keepdim=True)
    return torch.cat([torch.zeros_like(x), lit.expand_as(x)], 1)


def test_finds_a_known_cause():
    from monai.inferers import SimpleInferer

    case = Naive(Computed(blob), noise(1, 12, 20).abs() + 1, [MultiClassMask(1)], SimpleInferer())
    result = run(Rise(n_masks=600, grid=(4, 6), baseline="zero"), case.objective)
    peak = divmod(int(result.maps[0, 0].argmax()), 20)
    assert 3 <= peak[0] < 7
    assert 10 <= peak[1] < 14
    assert result.note(0)["convergence"] > 0.8


def test_scores_as_changes_differ_by_the_mean_mask():
    case = Naive(small(), noise(1, 6, 20))
    with frozen(case.net):
        value, change = (run(Rise(n_masks=8, grid=3, score=s), case.objective).maps[0, 0] for s in ("value", "change"))
    masks = Rise(n_masks=8, grid=3).masks(case.objective, case.image)
    mean = torch.stack([whole_mask(masks, i) for i in range(8)]).mean(0) / 0.5
    assert_equal(value - change, mean * float(case.value(case.image)[0]))


def test_parameters_are_checked():
    with pytest.raises(UsageError, match="p=1"):
        Rise(p=1)
    with pytest.raises(UsageError, match="score="):
        Rise(score="logit")
