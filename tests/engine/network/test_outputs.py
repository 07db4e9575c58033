"""The tensors that a network returns, and the choice of one of them."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai.engine.network.outputs import batch_first, choose_output, named_outputs, select_output
from esegeta_monai.errors import NetworkError

A, B = torch.zeros(1, 2), torch.ones(1, 3)


def test_every_tensor_has_a_key_that_selects_it():
    output = {"classes": [A, B], "boxes": (B, {"x": A}), "n": 3, "pred": B}
    tensors = named_outputs(output)
    assert list(tensors) == ["classes.0", "classes.1", "boxes.0", "boxes.1.x", "pred"]
    for key, tensor in tensors.items():
        assert select_output(output, key) is tensor


@pytest.mark.parametrize(
    ("output", "preferred", "key", "known"),
    [
        ({"a": A}, (), "a", True),
        ({"a": A, "b": B}, ("b",), "b", True),
        ({"pred": A, "b": B}, ("b",), "b", True),
        ({"aux": A, "pred": B}, (), "pred", False),
        ((A, B), (), 0, False),
        (([A, B], A), (), "0.0", False),
    ],
)
def test_the_choice_and_its_reason(output, preferred, key, known):
    choice = choose_output(output, preferred)
    assert choice.key == key
    assert (choice.reason is not None) == known
    assert len(choice.shapes) == len(named_outputs(output))


@pytest.mark.parametrize(
    ("shape", "n", "expected"),
    [((4,), 4, (4, 1)), ((), 1, (1, 1)), ((1,), 1, (1, 1)), ((3,), 1, (1, 3)), ((4, 2), 4, (4, 2))],
)
def test_every_image_has_its_row(shape, n, expected):
    values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    rows = batch_first(values, n)
    assert rows.shape == expected
    assert torch.equal(rows.flatten(), values.flatten())


@pytest.mark.parametrize("shape", [(), (3,)])
def test_one_number_for_a_batch_is_refused(shape):
    with pytest.raises(NetworkError, match="batch of 4 images"):
        batch_first(torch.zeros(shape), 4)


def test_stacked_heads_are_selected_along_the_second_axis():
    stacked = torch.stack([torch.full((2, 3, 4, 4), float(i)) for i in range(2)], 1)
    assert select_output(stacked, 1, axes=4).unique().tolist() == [1.0]
    assert select_output(stacked, 1, axes=4).shape == (2, 3, 4, 4)
    assert select_output({"x": stacked, "y": A}, "x.1", axes=4).unique().tolist() == [1.0]
    assert select_output(stacked, axes=4) is stacked  # the targets refuse it
    steps = torch.arange(30.0).reshape(2, 5, 3)
    assert torch.equal(select_output(steps, 4, axes=4), steps[:, 4])
    usual = torch.zeros(2, 3, 4, 4)
    assert select_output(usual, 0, axes=4) is usual
    with pytest.raises(NetworkError, match="single tensor"):
        select_output(usual, 1, axes=4)
