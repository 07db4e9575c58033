"""Fixed patches of the training loss: their places, padding, slices, and losses that cannot be used."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss
from torch import nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.parameter_gradients import parameters_of
from esegeta_monai.errors import InputError, NetworkError, UsageError
from esegeta_monai.explain.training_loss import TrainingCase, TrainingLoss


def case(*shape: int) -> TrainingCase:
    image = torch.rand(1, *shape)
    return TrainingCase("a", image, (image > 0.5).float())


def test_patches_cover_the_case_and_stay_the_same() -> None:
    whole = TrainingLoss(DiceLoss(), (8, -1), patches=99)
    one = case(20, 10)
    pieces = whole.pieces(one)
    assert [p.shape[2:] for p, _ in pieces] == [(8, 10)] * 3
    assert torch.equal(pieces[2][0][0], one.image[:, 12:])
    assert all(torch.equal(label, (image > 0.5).float()) for image, label in pieces)
    some = TrainingLoss(DiceLoss(), (4, 4), patches=5, seed=1)
    first, second = some.pieces(one), some.pieces(one)
    assert len(first) == 5
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second))
    other = TrainingLoss(DiceLoss(), (4, 4), patches=5, seed=2).pieces(one)
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(first, other))


def test_a_small_case_is_padded_and_a_class_is_passed_whole() -> None:
    ((image, label),) = TrainingLoss(DiceLoss(), (8, 8)).pieces(case(4, 8))
    assert image.shape == label.shape == (1, 1, 8, 8)
    assert image[0, 0, :2].abs().max() == 0
    classified = TrainingCase("c", torch.rand(1, 20, 20), torch.tensor(1))
    ((image, label),) = TrainingLoss(nn.CrossEntropyLoss(), (8, 8)).pieces(classified)
    assert image.shape == (1, 1, 20, 20)
    assert label.shape == (1,)
    with pytest.raises(UsageError, match="give 2 axes"):
        TrainingLoss(DiceLoss(), (8, 8, 8)).pieces(case(8, 8))
    with pytest.raises(UsageError, match="at least one patch"):
        TrainingLoss(DiceLoss(), patches=0)


def test_slices_of_a_2d_network() -> None:
    network = nn.Conv2d(1, 1, 3, padding=1).double()
    model, parameters = Model(network, torch.device("cpu")), parameters_of(network)
    volume = case(6, 6, 3)
    loss = TrainingLoss(DiceLoss(sigmoid=True))
    value, gradient = loss.gradient(model, parameters, volume, slice_axis=2)
    slices = [
        DiceLoss(sigmoid=True)(network(volume.image[None, ..., i].double()), volume.label[None, ..., i])
        for i in range(3)
    ]
    expected = sum(slices) / 3
    gradients = torch.autograd.grad(expected, parameters)
    assert value == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in gradients]))


@pytest.mark.parametrize(
    ("function", "error", "text"),
    [
        (nn.CrossEntropyLoss(), InputError, "cannot compare"),
        (lambda out, label: out.sum() * float("nan"), NetworkError, "no finite scalar"),
        (lambda out, label: out, NetworkError, "no finite scalar"),
        (lambda out, label: label.mean(), NetworkError, "does not depend"),
    ],
)
def test_losses_that_cannot_be_used(function, error, text: str) -> None:
    network = nn.Conv2d(1, 3, 3, padding=1)
    with pytest.raises(error, match=text):
        TrainingLoss(function).gradient(Model(network, torch.device("cpu")), parameters_of(network), case(8, 8))


def test_labels_on_another_grid_are_refused() -> None:
    with pytest.raises(InputError, match="one grid"):
        TrainingCase("a", torch.rand(1, 8, 8), torch.rand(1, 8, 9))
    with pytest.raises(InputError, match="give"):
        TrainingCase("a", torch.rand(8, 8), torch.tensor(1))
