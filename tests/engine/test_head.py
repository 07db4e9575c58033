"""Postprocessing as MONAI's transforms state it, and the masks of each head against MONAI's own transforms."""

from __future__ import annotations

import pytest
import torch
from monai.transforms import (
    Activations,
    Activationsd,
    AsDiscrete,
    AsDiscreted,
    Compose,
    EnsureTyped,
    FlattenSubKeysd,
    SplitDimd,
)

from esegeta_monai.engine.head import Head, Postprocessing
from esegeta_monai.engine.score import Case, WeightedScore
from esegeta_monai.errors import TargetError, UsageError
from esegeta_monai.targets import (
    ClassScore,
    Component,
    Errors,
    LabelMask,
    MultiClassMask,
    OutputValue,
    PredictedClasses,
    ThresholdMask,
    Voxel,
)
from tests.support.tensors import noise


@pytest.mark.parametrize(
    ("transforms", "key", "expected"),
    [
        (None, None, Postprocessing()),
        ([Activationsd("pred", softmax=True), AsDiscreted("pred", argmax=True)], None,
         Postprocessing("softmax", True, (), ("pred",))),
        (Compose([Compose([Activationsd(["label", "pred"], sigmoid=[False, True])]),
                  AsDiscreted("pred", threshold=0.3)]), "pred", Postprocessing("sigmoid", False, (0.3,), ("pred",))),
        (AsDiscreted(["label", "pred"], argmax=[True, False], threshold=[None, 0.4]), None,
         Postprocessing(None, False, (0.4,), ("pred",))),
        ([Activationsd("other", sigmoid=True)], "pred", Postprocessing(None, keys=("other",))),
        ([Activationsd("pred", other=torch.tanh)], None, Postprocessing("other", keys=("pred",))),
        ([Activations(sigmoid=True), AsDiscrete(threshold=0.5)], None, Postprocessing("sigmoid", False, (0.5,))),
        ([AsDiscrete(argmax=True, to_onehot=2, threshold=0.5)], None, Postprocessing(None, True)),
        ([EnsureTyped("pred"), FlattenSubKeysd("pred", sub_keys=["a", "b"])], None, Postprocessing(keys=("a", "b"))),
        ([FlattenSubKeysd("pred", sub_keys=["a", "b"]), Activationsd("b", sigmoid=True)], "pred",
         Postprocessing("sigmoid", keys=("b", "a"))),
        ([FlattenSubKeysd("pred", sub_keys=["a"], prefix="p"), Activationsd("p_a", sigmoid=True)], "pred",
         Postprocessing("sigmoid", keys=("p_a", "a"))),
        ([FlattenSubKeysd("pred"), Activationsd("b", softmax=True)], "pred", Postprocessing("softmax", keys=("b",))),
        ([FlattenSubKeysd("pred", sub_keys=["a"]), Activationsd("other", sigmoid=True)], "pred",
         Postprocessing(keys=("other", "a"))),
        ([SplitDimd("pred", output_postfixes=["x", "y"]), AsDiscreted(["pred_x", "pred_y"], threshold=[0.3, 0.7])],
         None, Postprocessing(None, False, (0.3, 0.7), ("pred_x", "pred_y"))),
        ([Activationsd("pred", sigmoid=True), SplitDimd("pred", output_postfixes=["x", "y"]),
          AsDiscreted(["pred_x", "pred_y"], threshold=[0.3, 0.7])], None,
         Postprocessing("sigmoid", False, (0.3, 0.7), ("pred", "pred_x", "pred_y"))),
    ],
)  # fmt: skip
def test_postprocessing_is_read_from_the_transforms(transforms, key, expected):
    assert Postprocessing.of(transforms, key) == expected
    assert Postprocessing.of(expected) is expected


def masks(head: Head, p: torch.Tensor, **case) -> list[torch.Tensor]:
    result = []
    for c in range(max(len(p), len(case.get("class_names", ())))):
        (score,) = MultiClassMask(c).bind(p, Case(head=head, **case))
        mask = torch.zeros(p.shape[1:], dtype=torch.bool)
        mask[score.box] = score.mask
        result.append(mask)
    return result


LOGITS = 2 * noise(3, 6, 5)
HEADS = {
    "softmax": (LOGITS, [Activations(softmax=True), AsDiscrete(argmax=True, to_onehot=3)]),
    "sigmoid": (LOGITS, [Activations(sigmoid=True), AsDiscrete(threshold=0.3)]),
    "softmax inside": (LOGITS.softmax(0), [AsDiscrete(argmax=True, to_onehot=3)]),
    "sigmoid inside": (LOGITS.sigmoid(), [AsDiscrete(threshold=0.6)]),
    "log-softmax inside": (LOGITS.log_softmax(0), [AsDiscrete(argmax=True, to_onehot=3)]),
}


@pytest.mark.parametrize("kind", HEADS)
def test_masks_are_those_of_the_bundles_postprocessing(kind):
    p, transforms = HEADS[kind]
    expected = Compose(transforms)(p.clone()).bool()
    for mask, right in zip(masks(Head(kind, True, (), Postprocessing.of(transforms)), p), expected):
        assert torch.equal(mask, right.as_tensor())
        assert 0 < int(mask.sum()) < mask.numel()


@pytest.mark.parametrize("kind", HEADS)
def test_without_postprocessing_masks_are_the_argmax_or_probability_above_half(kind):
    p, _ = HEADS[kind]
    right = (
        LOGITS.sigmoid() > 0.5 if kind.startswith("sigmoid") else torch.stack([LOGITS.argmax(0) == c for c in range(3)])
    )
    assert torch.equal(torch.stack(masks(Head(kind), p)), right)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
def test_probabilities_are_not_squashed_again(kind, output):
    """The value and its gradient with respect to the network's own output are those of autograd."""
    p = HEADS[kind][0].double().clone().requires_grad_(True)
    (score,) = MultiClassMask(1, output=output).bind(p.detach(), Case(head=Head(kind)))
    probability = LOGITS.double().sigmoid()[1] if kind.startswith("sigmoid") else LOGITS.double().softmax(0)[1]
    raw = {"logit": p.detach()[1], "probability": probability, "log_probability": probability.log()}[output]
    mask = torch.zeros(p.shape[1:], dtype=torch.bool)
    mask[score.box] = score.mask
    assert float(score.value(score.crop(p))) == pytest.approx(float(raw[mask].sum()), rel=1e-5)
    functions = {
        "logit": {"logit": lambda q: q[1], "probability": lambda q: q[1], "log_probability": lambda q: q[1]},
        "probability": {
            "logit": lambda q: q.sigmoid()[1] if kind == "sigmoid" else q.softmax(0)[1],
            "probability": lambda q: q[1],
            "log_probability": lambda q: q[1].exp(),
        },
        "log_probability": {
            "logit": lambda q: q.sigmoid()[1].log() if kind == "sigmoid" else q.log_softmax(0)[1],
            "probability": lambda q: q[1].log(),
            "log_probability": lambda q: q[1],
        },
    }
    (expected,) = torch.autograd.grad(functions[output][score.values](p)[mask].sum(), p)
    ours = torch.zeros_like(expected)
    ours[(list(score.channels), *score.box)] = score.cotangent(score.crop(p).detach())
    assert torch.allclose(ours, expected, rtol=1e-9, atol=1e-12)
    assert score.linear == (output in ("logit", score.values))


def test_units_name_probabilities():
    (score,) = MultiClassMask(1).bind(LOGITS.softmax(0), Case(head=Head("softmax inside")))
    assert score.units == "probability (the network's raw output)"
    assert MultiClassMask(1).bind(LOGITS, Case())[0].units == "raw output"


def test_a_softmax_inside_whose_background_is_not_returned():
    """The classes left out are one more class: 1 - Σ p."""
    whole = LOGITS.softmax(0)
    for c, mask in enumerate(masks(Head("softmax inside"), whole[1:])):
        assert torch.equal(mask, whole.argmax(0) == c + 1)


TWO = {0: "benign", 1: "malignant"}


@pytest.mark.parametrize("z", [-1.5, 2.5])
@pytest.mark.parametrize("kind", ["unknown", "sigmoid", "sigmoid inside"])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_one_output_and_two_names(z, kind, shape):
    p = torch.full(shape, z, dtype=torch.float64)
    p = p.sigmoid() if kind.endswith("inside") else p
    case = Case(class_names=TWO, head=Head(kind))
    probability = float(torch.sigmoid(torch.tensor(z, dtype=torch.float64)))
    for target in (PredictedClasses(), ClassScore()):
        (score,) = target.bind(p, case)
        assert (score.class_index, score.class_name) == ((1, "malignant") if z > 0 else (0, "benign"))
    for name, sign, right in (("malignant", 1, probability), (1, 1, probability), ("benign", -1, 1 - probability)):
        (score,) = ClassScore(name).bind(p, case)
        raw = float(score.value(score.crop(p)))
        assert raw == pytest.approx(right if kind.endswith("inside") else sign * z)
        assert score.constant() + float(
            (score.cotangent(score.crop(p)).flatten() * p.flatten()).sum()
        ) == pytest.approx(raw)
        (score,) = ClassScore(name, output="probability").bind(p, case)
        assert float(score.value(score.crop(p))) == pytest.approx(right)
    assert [s.class_index for s in ClassScore(top_k=2).bind(p, case)] == ([1, 0] if z > 0 else [0, 1])


def test_one_channel_and_two_names():
    z = 2 * noise(1, 6, 5)
    case = Case(class_names={0: "background", 1: "lesion"})
    background, lesion = masks(Head(), z, class_names=case.class_names)
    assert torch.equal(lesion, z[0] > 0)
    assert torch.equal(background, z[0] <= 0)
    assert [s.class_name for s in PredictedClasses().bind(z, case)] == ["lesion"]
    (score,) = MultiClassMask("background").bind(z, case)
    assert float(score.value(score.crop(z))) == pytest.approx(float(-z[0][background].sum()))
    assert float(score.window_cotangent(lambda m: m).sum()) == -int(background.sum())
    (errors,) = Errors(torch.ones(6, 5), "false_negative", "lesion").bind(z, case)
    assert errors.voxels == int(background.sum())
    (errors,) = Errors(torch.ones(6, 5), "false_positive", "background").bind(z, case)
    assert errors.voxels == int(background.sum())
    (voxel,) = Voxel(index=(2, 2)).bind(z, case)
    assert voxel.class_index == int(z[0, 2, 2] > 0)
    (under,) = LabelMask(torch.ones(6, 5), label=1).bind(z, case)
    assert (under.class_name, float(under.value(under.crop(z)))) == ("lesion", pytest.approx(float(z.sum())))
    assert Component("lesion").bind(z, case)[0].class_index == 1
    for target in (ThresholdMask(0.5), OutputValue()):  # their number is that of a channel
        assert target.bind(z, case)[0].class_name == "lesion"
    with pytest.raises(TargetError, match="the evidence for lesion"):
        OutputValue("background").bind(z, case)
    with pytest.raises(TargetError, match="2 output channel"):
        MultiClassMask(2).bind(z, case)


def test_every_label_above_its_threshold_is_predicted():
    p, names = torch.tensor([2.0, 2.5, -3.0, 1.5]), {0: "effusion", 1: "mass", 2: "hernia", 3: "nodule"}
    case = Case(class_names=names, head=Head("sigmoid", True))
    scores = PredictedClasses(output="probability").bind(p, case)
    assert [s.class_name for s in scores] == ["effusion", "mass", "nodule"]
    assert [float(s.value(s.crop(p))) for s in scores] == pytest.approx(p[[0, 1, 3]].sigmoid().tolist())
    (none,) = PredictedClasses().bind(-p.abs(), case)
    assert none.empty
    bundle = Postprocessing("sigmoid", False, (0.95, 0.5, 0.01, 0.5))
    case = Case(class_names=names, head=Head("sigmoid", True, (), bundle))
    assert [s.class_name for s in PredictedClasses().bind(p, case)] == ["mass", "hernia", "nodule"]
    exclusive = Case(class_names=names)
    assert [s.class_name for s in PredictedClasses().bind(p, exclusive)] == ["mass"]


def test_values_that_are_no_scores_of_classes():
    case = Case(head=Head("raw", True, ("a regression",)))
    p = noise(2, 6, 5)
    for target in (MultiClassMask(1), PredictedClasses(), Component(1)):
        with pytest.raises(TargetError, match="no scores of classes"):
            target.bind(p, case)
    with pytest.raises(TargetError, match="no probabilities"):
        Voxel(1, index=(1, 1), output="probability").bind(p, case)
    assert Voxel(1, index=(1, 1)).bind(p, case)[0].voxels == 1


def test_thresholds_compare_the_networks_own_probabilities():
    p = LOGITS.sigmoid()
    for value in ("sigmoid", "softmax"):
        (score,) = ThresholdMask(0.6, channel=1, value=value).bind(p, Case(head=Head("sigmoid inside")))
        assert score.voxels == int((p[1] > 0.6).sum())
    (score,) = ThresholdMask(0.6, channel=1).bind(p.log(), Case(head=Head("log-softmax inside")))
    assert score.voxels == int((p[1] > 0.6).sum())


def test_wrong_kinds_are_refused():
    with pytest.raises(UsageError, match="give 'softmax', 'sigmoid'"):
        Head("probabilities")  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="log-probability of one class"):
        WeightedScore(torch.tensor(True), 0, 1, values="log_probability", complement=True)
