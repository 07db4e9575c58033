"""All perturbations write into a batch what they make of a window, and leave out those that change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esegeta_monai.engine.perturbation.base import UNCHANGED, Added, Perturbations
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.masks import Segments, SmoothMasks
from tests.support.tensors import noise

SHAPE = (2, 9, 8)


IMAGE, OTHER = noise(*SHAPE), noise(*SHAPE) / 2


IMAGE[:, :4, :4] = OTHER[:, :4, :4] = 0.25  # where nothing is changed


STARTS, STOPS = [(0, 0), (2, 3), (5, 5), (8, 0)], [(3, 3), (6, 6), (9, 8), (9, 2)]


LABELS = (torch.arange(9)[:, None] // 3 * 3 + torch.arange(8) // 3)[None] - 1


COALITIONS = np.random.default_rng(0).random((6, 8)) < 0.5


def all_kinds() -> dict[str, Perturbations]:
    masks = torch.ones(3, 2, 2)
    masks[1, 0, 1], masks[2] = 0.5, 0.0
    deltas = torch.zeros(3, *SHAPE)
    deltas[1, 1, 4, 4], deltas[2] = 1.0, OTHER
    return {
        "boxes": Boxes(STARTS, STOPS, OTHER),
        "boxes, a number": Boxes(STARTS, STOPS, 0.25),
        "boxes of a channel": Boxes(STARTS, STOPS, OTHER, [(0,), (1,), (1,), (0,)]),
        "boxes of channels in no order": Boxes(STARTS, STOPS, OTHER, [(1, 0)] * 4),
        "segments": Segments(LABELS, COALITIONS, OTHER, IMAGE),
        "segments of channels": Segments(torch.cat([LABELS, LABELS]), COALITIONS, OTHER, IMAGE),
        "segments in float64": Segments(LABELS, COALITIONS, OTHER.double(), IMAGE.double()),
        "masks": SmoothMasks(masks, SHAPE[1:], OTHER),
        "added": Added(deltas),
        "some of them": Boxes(STARTS, STOPS, OTHER).take([3, 0, 1]),
        "some segments": Segments(LABELS, COALITIONS, OTHER, IMAGE).take([5, 2]),
    }


@pytest.mark.parametrize("place", [(slice(0, 9), slice(0, 8)), (slice(0, 4), slice(0, 5)), (slice(3, 9), slice(2, 8))])
@pytest.mark.parametrize("kind", all_kinds())
def test_what_is_written_is_what_is_applied(kind, place):
    perturbations = all_kinds()[kind]
    image = IMAGE.double() if "float64" in kind else IMAGE
    crop = image[(slice(None), *place)]
    near = perturbations.reaching(place)
    indices = [i for i, key in zip(near, perturbations.keys(near, 0, place)) if key != UNCHANGED]
    changing = [j for j, i in enumerate(indices) if perturbations.changes(i, crop, place)]
    out = torch.full((len(indices) + 1, *crop.shape), float("nan"), dtype=crop.dtype)
    before = crop.clone()
    written = perturbations.write(indices, crop, place, out[:-1])
    assert list(written) == changing
    for row, j in zip(out, changing):
        applied = perturbations.apply(indices[j], crop, place)
        assert torch.equal(row, applied)
        assert not torch.equal(row, crop)
    assert bool(out[-1].isnan().all())
    assert torch.equal(crop, before)


def test_all_kinds_leave_something_out_and_keep_something():
    whole = tuple(slice(0, n) for n in SHAPE[1:])
    counts = {kind: (sum(p.changes(i, IMAGE, whole) for i in range(len(p))), len(p)) for kind, p in all_kinds().items()}
    assert all(some > 0 for some, _ in counts.values()), counts
    assert sum(some < n for some, n in counts.values()) >= 5, counts
