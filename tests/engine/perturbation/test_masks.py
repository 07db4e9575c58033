"""Masks made for a crop equal those of the whole volume, and equal keys mean equal windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.perturbation.base import UNCHANGED
from esegeta_monai.engine.perturbation.masks import Segments, SmoothMasks
from esegeta_monai.engine.perturbation.scoring import known_score_changes, passes_needed, score_changes
from esegeta_monai.targets import MultiClassMask, Voxel
from tests.support.networks import small
from tests.support.objectives import Naive, whole_mask
from tests.support.tensors import assert_equal, noise

PLACE = (slice(3, 9), slice(5, 8), slice(0, 6))


@pytest.mark.parametrize("extent", [None, (12, 14, 10)])
def test_a_mask_of_a_crop_is_the_crop_of_the_mask(extent):
    generator = torch.Generator().manual_seed(0)
    grids = torch.rand(4, 3, 4, 2, generator=generator, dtype=torch.float64)
    shifts = torch.tensor([[0, 0, 0], [1, 2, 0], [2, 1, 3], [0, 0, 0]]) if extent else None
    masks = SmoothMasks(grids, (10, 12, 7), torch.zeros(1), shifts, extent)
    for i in range(4):
        assert_equal(masks.mask(i, PLACE), whole_mask(masks, i)[PLACE])
    weights = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    expected = sum(w * whole_mask(masks, i) for i, w in enumerate(weights[0]))
    assert_equal(masks.weighted_sum(weights)[0], expected)


def test_masks_with_equal_keys_make_equal_crops_and_no_others():
    grids = (torch.rand(40, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    masks = SmoothMasks(grids, (16, 16), torch.zeros(1, 16, 16, dtype=torch.float64))
    place = (slice(0, 5), slice(2, 9))
    crop = noise(1, 5, 7)
    by_key: dict = {}
    for i in range(40):
        by_key.setdefault(masks.key(i, 0, place), []).append(masks.apply(i, crop, place))
    assert 1 < len(by_key) < 40
    assert UNCHANGED in by_key
    for key, crops in by_key.items():
        assert all(torch.equal(c, crops[0]) for c in crops)
        if key == UNCHANGED:
            assert_equal(crops[0], crop)
    different = [c[0] for c in by_key.values()]
    assert len({d.numpy().tobytes() for d in different}) == len(different)


def test_segments_with_equal_keys_make_equal_crops():
    labels = torch.arange(100).reshape(1, 10, 10) // 9 - 1
    coalitions = np.random.default_rng(0).random((60, 11)) > 0.4
    image = noise(1, 10, 10)
    segments = Segments(labels, coalitions, torch.zeros_like(image), image)
    place = (slice(0, 3), slice(2, 6))
    crop = image[:, 0:3, 2:6]
    by_key: dict = {}
    for i in range(60):
        by_key.setdefault(segments.key(i, 0, place), []).append(segments.apply(i, crop, place))
    assert all(torch.equal(c, crops[0]) for crops in by_key.values() for c in crops)
    assert torch.equal(by_key[UNCHANGED][0], crop)
    assert len(by_key) == 2**2  # features 0 and 1; the first row belongs to none


def test_features_that_equal_the_baseline_are_distinguished_from_nothing():
    labels = (torch.arange(16) // 4).expand(1, 8, 16).contiguous()
    image = noise(1, 8, 16)
    image[..., :4] = 0  # feature 0 is background
    segments = Segments(
        labels, np.array([[0, 1, 1, 1], [0, 0, 1, 1], [1, 0, 1, 1]], bool), torch.zeros(1, 8, 16), image
    )
    place = (slice(0, 8), slice(0, 8))
    crop = image[..., :8]
    assert segments.key(0, 0, place) == UNCHANGED
    assert not segments.changes(0, crop, place)
    assert segments.key(1, 0, place) == segments.key(2, 0, place) != UNCHANGED
    assert torch.equal(segments.apply(1, crop, place), segments.apply(2, crop, place))


def test_no_perturbation_changes_the_crop_it_gets():
    crop, before = noise(1, 6, 6), noise(1, 6, 6)
    place = (slice(0, 6), slice(0, 6))
    labels = torch.zeros(1, 6, 6, dtype=torch.long)
    Segments(labels, np.array([[False]]), torch.zeros_like(crop), crop).apply(0, crop, place)
    SmoothMasks(torch.zeros(1, 2, 2), (6, 6), torch.zeros(1, 6, 6)).apply(0, crop, place)
    assert torch.equal(crop, before)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_windows_in_which_coalitions_agree_are_computed_once(output):
    """40 coalitions of 8 stripes: no window sees more than two stripes at a time, so at most three changes of it."""
    case = Naive(small(), noise(1, 8, 32), [MultiClassMask(1, output=output)])
    labels = (torch.arange(32) // 4).expand(1, 8, 32).contiguous()
    coalitions = np.random.default_rng(1).random((40, 8)) > 0.5
    segments = Segments(labels, coalitions, torch.zeros_like(case.image), case.image)
    with frozen(case.net):
        changes = score_changes(case.objective, segments)
    windows = len(case.objective.windows)
    assert case.objective.context.progress.passes == passes_needed(case.objective, segments) <= windows * (1 + 3)
    assert_equal(changes, case.change(case.objective, segments))


def test_blocks_of_a_non_linear_target_count_and_score_the_same(monkeypatch):
    case = Naive(small(), noise(1, 8, 24), [MultiClassMask(1, output="probability")])
    labels = (torch.arange(24) // 4).expand(1, 8, 24).contiguous()
    segments = Segments(labels, np.random.default_rng(1).random((9, 6)) > 0.5, torch.zeros_like(case.image), case.image)
    with frozen(case.net):
        whole = score_changes(case.objective, segments)
        monkeypatch.setattr("esegeta_monai.engine.perturbation.batching.CHUNK_BYTES", 8 * 3 * 8 * 24 * 2)
        before = case.objective.context.progress.passes
        blocks = score_changes(case.objective, segments)
    assert_equal(blocks, whole)
    assert case.objective.context.progress.passes - before <= passes_needed(case.objective, segments)
    assert case.objective.context.progress.passes - before > before


def test_known_perturbations_are_looked_up():
    case = Naive(small(), noise(1, 8, 16), [MultiClassMask(1), Voxel(0, index=(1, 1))])
    labels = (torch.arange(16) // 4).expand(1, 8, 16).contiguous()
    rows = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1], [1, 1, 1, 1]], dtype=bool)
    zero = torch.zeros_like(case.image)
    with frozen(case.net):
        first = known_score_changes(case.objective, Segments(labels, rows, zero, case.image))
        spent = case.objective.context.progress.passes
        again = known_score_changes(case.objective, Segments(labels, rows[[1, 0]], zero, case.image))
        assert case.objective.context.progress.passes == spent
        known_score_changes(case.objective, Segments(labels, rows, zero + 1, case.image))
        assert case.objective.context.progress.passes > spent
    assert torch.equal(first[:, [1, 0]], again)
    assert torch.equal(first[:, 0], first[:, 2])
    assert bool((first[:, 3] == 0).all())
    assert_equal(first, case.change(case.objective, Segments(labels, rows, zero, case.image)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whether_a_mask_changes_a_window_is_as_if_all_of_it_was_made(dtype):
    """Clear changes, changes in one corner only, by rounding only, and none; also where the image is the baseline."""
    torch.manual_seed(0)
    grids = torch.cat([torch.rand(6, 4, 4), torch.ones(4, 4, 4)]).to(dtype)
    grids[6, 0, 0], grids[7, 3, 3], grids[8] = 0.0, 0.0, 1.0 - torch.finfo(dtype).eps
    image = torch.randn(2, 20, 24, dtype=dtype)
    baseline = torch.zeros_like(image)
    baseline[:, 6:14] = image[:, 6:14]
    masks = SmoothMasks(grids, (20, 24), baseline)
    seen = set()
    for place in [(slice(0, 20), slice(0, 24)), (slice(6, 14), slice(2, 20)), (slice(4, 9), slice(10, 24))]:
        crop = image[(slice(None), *place)]
        for i in range(len(masks)):
            changed = masks.changes(i, crop, place)
            assert changed == (not torch.equal(masks.apply(i, crop, place), crop))
            seen.add((i, changed))
    assert {(6, True), (7, True), (9, False), (0, False), (0, True)} <= seen
