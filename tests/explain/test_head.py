"""The meaning of the output, and the choice of one of several, in maps and records."""

from __future__ import annotations

import logging

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.transforms import Activationsd, AsDiscreted
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import InputError, NetworkError, TargetError, UsageError
from esegeta_monai.methods import GradCam, InputXGradient, Occlusion, Saliency
from esegeta_monai.targets import (
    Box,
    ClassScore,
    Component,
    Errors,
    LabelMask,
    MultiClassMask,
    OutputValue,
    PredictedClasses,
    TargetWrapper,
    ThresholdMask,
    Voxel,
)
from tests.explain.support import only

IMAGE = torch.zeros(1, 1, 12, 12)
IMAGE[..., 3:6, 3:6] = 4.0
"""A lesion of 9 voxels; `Lesion` gives the logit 4 there and -4 elsewhere."""


class Lesion(nn.Module):
    def __init__(self, last: nn.Module | None = None, bias: tuple[float, ...] = (-4.0,)) -> None:
        super().__init__()
        self.c, self.last = nn.Conv2d(1, len(bias), 1), last or nn.Identity()
        with torch.no_grad():
            self.c.weight.fill_(2.0)
            self.c.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.c(x))


class MeanOfSigmoids(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return (torch.sigmoid(y) + torch.sigmoid(2 * y)) / 2


class Pooled(nn.Module):
    """A classifier with k outputs, and a last step."""

    def __init__(self, bias: tuple[float, ...], last=lambda y: y) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.c, self.f = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, len(bias))
        with torch.no_grad():
            self.f.bias.copy_(torch.tensor(bias))
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(torch.relu(self.c(x)).mean((2, 3))))


def gradient(function, image: Tensor) -> Tensor:
    x = image.clone().requires_grad_(True)
    return torch.autograd.grad(function(x), x)[0][0]


@pytest.mark.parametrize("windows", [None, SlidingWindowInferer((8, 8), 2, 0.5, "gaussian")], ids=["whole", "windows"])
def test_a_sigmoid_inside_gives_the_mask_of_probability_above_half(windows):
    network = Lesion(nn.Sigmoid()).eval()
    targets = [PredictedClasses(), MultiClassMask(0), ThresholdMask(0.5), Component(0), ThresholdMask(0.5, value="raw")]
    for a in Explainer(network, windows)(IMAGE, [InputXGradient()], targets):
        assert a.record["target_voxels"] == 9
        assert a.record["value"] == pytest.approx(9 * float(torch.sigmoid(torch.tensor(4.0))), rel=1e-5)
        assert a.record["head"]["kind"] == "sigmoid inside"
        assert a.record["value_units"] == "probability (the network's raw output)"
        (check,) = [c for c in a.record["checks"] if c["check"] == "head"]
        assert check["verdict"] == "handled"
        assert not a.record["warnings"]


def test_output_probability_is_not_squashed_again():
    network = Lesion(nn.Sigmoid()).eval()
    target = MultiClassMask(0, output="log_probability")
    result = only(Explainer(network)(IMAGE, [Saliency(abs=False)], [target]))
    expected = gradient(lambda x: network(x)[0, 0, 3:6, 3:6].log().sum(), IMAGE)
    assert torch.allclose(result.map.as_tensor(), expected, rtol=1e-5, atol=1e-7)
    same = [
        only(Explainer(network)(IMAGE, [Saliency()], [MultiClassMask(0, output=o)])) for o in ("logit", "probability")
    ]
    assert torch.equal(same[0].map.as_tensor(), same[1].map.as_tensor())


def test_overlapping_channels_with_a_sigmoid_inside():
    network = Lesion(nn.Sigmoid(), (-4.0, -4.0, -40.0)).eval()
    for targets in ([PredictedClasses(activation="sigmoid")], [PredictedClasses()]):
        result = list(Explainer(network)(IMAGE, [Saliency()], targets))
        assert [a.record["target_voxels"] for a in result] == [9, 9]


def test_each_channel_has_the_bundles_threshold():
    """One of MONAI's transforms on raw output, another after a sigmoid inside."""
    network = Lesion(None, (-9.0, -7.0)).eval()  # logits -1 and 1 in the lesion: probabilities 0.27 and 0.73
    post = [Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.25)]
    result = list(Explainer(network, postprocessing=post)(IMAGE, [Saliency()], [PredictedClasses()]))
    assert [a.record["target_voxels"] for a in result] == [9, 9]
    result = list(Explainer(network, head="sigmoid")(IMAGE, [Saliency()], [PredictedClasses()]))
    assert [(a.record["class_index"], a.record["target_voxels"]) for a in result] == [(1, 9)]
    inside = Lesion(nn.Sigmoid(), (-9.0, -7.0)).eval()
    post = [AsDiscreted("pred", threshold=0.8)]
    result = list(Explainer(inside, postprocessing=post)(IMAGE, [Saliency()], [PredictedClasses()]))
    assert [a.status for a in result] == ["empty_target"]


def test_squashed_twice_is_refused_unless_confirmed():
    network, post = (
        Lesion(nn.Sigmoid()).eval(),
        [Activationsd("pred", sigmoid=True), AsDiscreted("pred", threshold=0.5)],
    )
    with pytest.raises(NetworkError, match="squashed twice"):
        list(Explainer(network, postprocessing=post)(IMAGE, [Saliency()], [PredictedClasses()]))
    (failed,) = Explainer(network, postprocessing=post, on_error="record")(IMAGE, [Saliency()], [PredictedClasses()])
    assert "squashed twice" in failed.record["reason"]
    right = only(
        Explainer(network, postprocessing=post, head="sigmoid inside")(IMAGE, [Saliency()], [PredictedClasses()])
    )
    assert right.record["target_voxels"] == 9
    as_bundle = only(Explainer(network, postprocessing=post, head="sigmoid")(IMAGE, [Saliency()], [PredictedClasses()]))
    assert as_bundle.record["target_voxels"] == 144  # the sigmoid of a probability is above 0.5 everywhere


def test_an_uncertain_head_is_a_warning(caplog):
    network = Lesion(MeanOfSigmoids()).eval()
    with caplog.at_level(logging.WARNING, logger="esegeta_monai"):
        record = only(Explainer(network)(IMAGE, [Saliency()], [MultiClassMask(0)])).record
    assert any("confirm by head=" in w for w in record["warnings"])
    assert "confirm by head=" in caplog.text
    assert record["head"]["kind"] == "unknown"
    for head in ("sigmoid inside", "sigmoid"):
        record = only(Explainer(network, head=head)(IMAGE, [Saliency()], [MultiClassMask(0)])).record
        assert not record["warnings"]
        assert record["target_voxels"] == (9 if head == "sigmoid inside" else 144)


def test_wrong_values_are_refused():
    with pytest.raises(UsageError, match="head='probabilities': give 'softmax'"):
        Explainer(Lesion(), head="probabilities")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="network is a str"):
        Explainer("net")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="inputs_as='tuple'"):
        Explainer(Lesion(), inputs_as="tuple")  # type: ignore[arg-type]


# ---- classification ----------------------------------------------------------------------------------------------

TWO = {0: "benign", 1: "malignant"}


@pytest.mark.parametrize("bias", [-3.0, 3.0])
def test_one_logit_and_two_names(bias):
    network = Pooled((bias,)).eval()
    z = float(network(IMAGE).detach())
    explainer = Explainer(network, class_names=TWO)
    record = only(explainer(IMAGE, [Saliency()], [PredictedClasses()])).record
    p = float(torch.sigmoid(torch.tensor(abs(z))))
    name = "malignant" if z > 0 else "benign"
    assert (record["class_name"], record["predicted_class_name"]) == (name, name)
    assert record["predicted_probability"] == pytest.approx(p, rel=1e-5)
    assert record["value"] == pytest.approx(abs(z), rel=1e-5)
    maps = [
        only(explainer(IMAGE, [Saliency(abs=False)], [ClassScore(n)])).map.as_tensor() for n in ("malignant", "benign")
    ]
    expected = gradient(lambda x: network(x)[0, 0], IMAGE)
    assert torch.allclose(maps[0], expected, rtol=1e-5, atol=1e-8)
    assert torch.equal(maps[1], -maps[0])
    occluded = [only(explainer(IMAGE, [Occlusion(window=4)], [ClassScore(n)])).map.as_tensor() for n in TWO.values()]
    assert torch.allclose(occluded[0], -occluded[1], atol=1e-7)


def test_labels_that_do_not_exclude_each_other():
    network = Pooled((2.0, 2.5, -3.0, 1.5)).eval()
    names = {0: "effusion", 1: "mass", 2: "hernia", 3: "nodule"}
    probabilities = torch.sigmoid(network(IMAGE).detach())[0]
    explainer = Explainer(network, class_names=names, postprocessing=[Activationsd("pred", sigmoid=True)])
    result = list(explainer(IMAGE, [Saliency()], [PredictedClasses()]))
    assert [a.record["class_name"] for a in result] == ["effusion", "mass", "nodule"]
    assert result[0].record["predicted_probability"] == pytest.approx(float(probabilities[1]), rel=1e-6)
    low = Explainer(Pooled((-9.0, -9.0)).eval(), head="sigmoid")
    (empty,) = low(IMAGE, [Saliency()], [PredictedClasses()])
    assert empty.status == "empty_target"
    assert "no class of the prediction is above its threshold" in empty.record["reason"]
    assert only(low(IMAGE, [Saliency()], [ClassScore(0)])).record["predicted_class"] is None


def test_a_softmax_inside_has_its_own_probability():
    network = Pooled((1.0, 2.0, 0.0), lambda y: torch.softmax(y, 1)).eval()
    record = only(Explainer(network)(IMAGE, [Saliency()], [ClassScore()])).record
    best = network(IMAGE)[0].max()
    assert record["predicted_probability"] == pytest.approx(float(best.detach()), rel=1e-6)
    assert record["value"] == pytest.approx(float(best.detach()), rel=1e-6)


def test_a_single_number_without_evidence_is_no_class():
    for last in (lambda y: y, lambda y: y.squeeze(1), lambda y: y.squeeze()):
        record = only(Explainer(Pooled((0.2,), last).eval())(IMAGE, [Saliency()], [OutputValue()])).record
        assert record["predicted_class"] is None


# ---- outputs of other shapes -------------------------------------------------------------------------------------

ANY = [ClassScore(1), OutputValue(1), PredictedClasses(), MultiClassMask(1), ThresholdMask(0.5), Component(1)]
ANY += [Voxel(index=(1, 1)), Box(1, (0, 0), (2, 2)), LabelMask("m", class_index=1), Errors("m", "false_positive", 1)]


class Reshaped(nn.Module):
    """Two heads of three classes (B, 2, 3, H, W), or five vectors of three (B, 5, 3)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.c, self.f = kind, nn.Conv2d(1, 3, 1), nn.Linear(3, 15)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        return torch.stack([y, 1 - y], 1) if self.kind == "heads" else self.f(y.mean((2, 3))).reshape(-1, 5, 3)


@pytest.mark.parametrize("kind", ["heads", "steps"])
def test_axes_that_are_no_classes_are_refused_by_every_target(kind):
    network = Reshaped(kind).eval()
    result = list(Explainer(network, on_error="record")(IMAGE, [Saliency()], ANY, data={"m": IMAGE[0]}))
    assert len(result) == len(ANY)
    for a in result:
        assert a.status == "failed"
        assert "choose one by output=INDEX" in a.record["reason"], a.record["reason"]
    for target in ANY:
        with pytest.raises(TargetError, match="output=INDEX"):
            TargetWrapper(network, target).freeze(IMAGE)


def test_the_index_selects_a_head_or_a_step():
    heads, steps = Reshaped("heads").eval(), Reshaped("steps").eval()
    methods = [Saliency(abs=False), GradCam(layer="c"), Occlusion(window=4)]
    c = int(heads(IMAGE)[0, 1].argmax(0)[4, 4])
    where = heads(IMAGE)[0, 1].argmax(0) == c
    saliency, cam, occlusion = Explainer(heads, output=1)(IMAGE, methods, [MultiClassMask(c)])
    expected = gradient(lambda x: heads(x)[0, 1, c][where].sum(), IMAGE)
    assert torch.allclose(saliency.map.as_tensor(), expected, rtol=1e-5, atol=1e-8)
    assert {a.record["target_voxels"] for a in (saliency, cam, occlusion)} == {int(where.sum())}
    assert saliency.record["output"] == 1
    result = only(Explainer(steps, output=4)(IMAGE, [Saliency(abs=False)], [ClassScore(1)]))
    assert torch.allclose(result.map.as_tensor(), gradient(lambda x: steps(x)[0, 4, 1], IMAGE), rtol=1e-5, atol=1e-9)
    given = only(Explainer(steps, output=4)(IMAGE, [Saliency()], [ClassScore(1)], prediction=steps(IMAGE).detach()))
    assert given.record["value"] == pytest.approx(float(steps(IMAGE)[0, 4, 1]))


@pytest.mark.parametrize("last", [lambda y: y.squeeze(1), lambda y: y.squeeze()], ids=["(B,)", "()"])
@pytest.mark.parametrize("given", [False, True])
def test_one_number_per_image(last, given):
    network, plain = Pooled((0.2,), last).eval(), Pooled((0.2,)).eval()
    batch = torch.cat([IMAGE, IMAGE.flip(-1) * 0.5])
    methods, targets = [Saliency(abs=False), Occlusion(window=4)], [OutputValue(), ClassScore(0)]
    prediction = network(batch).detach() if given else None
    result = list(Explainer(network)(batch, methods, targets, prediction=prediction))
    right = list(Explainer(plain)(batch, methods, targets))
    assert len(result) == len(right) == 8
    for a, b in zip(result, right):
        assert torch.equal(a.map.as_tensor(), b.map.as_tensor())
        assert a.record["value"] == b.record["value"]
    wrapper = TargetWrapper(network, OutputValue()).freeze(IMAGE)
    assert float(wrapper(IMAGE)) == pytest.approx(float(plain(IMAGE)))


def test_one_number_for_a_batch_is_named():
    network = Pooled((0.2,), lambda y: y.mean()).eval()
    (ours,) = Explainer(network)(IMAGE, [Occlusion(window=4, baseline=0.0)], [OutputValue()])  # one image per pass
    changed = IMAGE.clone()
    changed[..., :4, :4] = 0
    with torch.no_grad():
        expected = float(network(IMAGE) - network(changed))
    assert float(ours.map[0, 0, 0]) == pytest.approx(expected, rel=1e-4, abs=1e-7)
    with pytest.raises(NetworkError, match="its own row"):
        list(Explainer(network, checks=False)(IMAGE, [Occlusion(window=4)], [OutputValue()]))


# ---- several outputs ---------------------------------------------------------------------------------------------


class Several(nn.Module):
    def __init__(self, form) -> None:
        super().__init__()
        self.form, self.a, self.b = form, nn.Conv2d(1, 2, 1), nn.Conv2d(1, 3, 1)

    def forward(self, x: Tensor):
        return self.form(self.a(x), self.b(x))


FORMS = {
    "tuple": (lambda a, b: (a, b), 0, 1),
    "list": (lambda a, b: [a, b], 0, 1),
    "dict": (lambda a, b: {"out": a, "aux": b}, "out", "aux"),
    "nested": (lambda a, b: ([a, b], a), "0.0", "0.1"),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("given", [False, True])
def test_which_of_several_outputs_is_explained_is_never_silent(name, given):
    form, first, second = FORMS[name]
    network = Several(form).eval()
    more = {"prediction": network(IMAGE)} if given else {}
    record = only(Explainer(network)(IMAGE, [Saliency()], [Box(1, (0, 0), (3, 3))], **more)).record
    assert record["output"] == first
    (warning,) = record["warnings"]
    assert "(1, 2, 12, 12)" in warning and "(1, 3, 12, 12)" in warning  # noqa: PT018
    chosen = only(Explainer(network, output=second)(IMAGE, [Saliency(abs=False)], [Box(2, (0, 0), (3, 3))], **more))
    assert chosen.record["output"] == second
    assert not chosen.record["warnings"]
    expected = gradient(lambda x: network.b(x)[0, 2, :3, :3].sum(), IMAGE)
    assert torch.allclose(chosen.map.as_tensor(), expected)


def test_the_postprocessing_chooses_an_output():
    network = Several(lambda a, b: {"pred": a, "seg": b}).eval()
    explainer = Explainer(network, postprocessing=[AsDiscreted("seg", argmax=True)])
    record = only(explainer(IMAGE, [Saliency()], [Box(2, (0, 0), (3, 3))])).record
    assert record["output"] == "seg"
    assert not record["warnings"]
    assert [c["verdict"] for c in record["checks"] if c["check"] == "outputs"] == ["handled"]


def test_a_single_tensor_has_no_key():
    record = only(Explainer(Lesion().eval())(IMAGE, [Saliency()], [MultiClassMask(0)])).record
    assert record["output"] is None
    record = only(
        Explainer(Several(lambda a, b: {"x": a}).eval())(IMAGE, [Saliency()], [Box(1, (0, 0), (3, 3))])
    ).record
    assert record["output"] == "x"
    assert not record["warnings"]


def test_detection_heads_are_listed_and_one_is_answered():
    network = Several(lambda a, b: {"classification": [a, a[..., ::2, ::2]], "box_regression": [b]}).eval()
    with pytest.raises(NetworkError, match=r"classification\.0 \(1, 2, 12, 12\), .*box_regression\.0 \(1, 3, 12, 12\)"):
        list(Explainer(network)(IMAGE, [Saliency()], [Box(1, (0, 0), (3, 3))]))
    for output in ("classification.0", ("classification", 0)):
        result = only(Explainer(network, output=output)(IMAGE, [Saliency(abs=False)], [Box(1, (0, 0), (3, 3))]))
        assert torch.allclose(result.map.as_tensor(), gradient(lambda x: network.a(x)[0, 1, :3, :3].sum(), IMAGE))


# ---- inputs ------------------------------------------------------------------------------------------------------


class Joint(nn.Module):
    """Takes all its inputs as one dict or list."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.a, self.b = form, nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)

    def forward(self, inputs):
        t1, flair = (inputs["t1"], inputs["flair"]) if self.form == "dict" else inputs
        return self.a(t1) * self.b(flair)


@pytest.mark.parametrize("form", ["dict", "list"])
def test_inputs_in_one_argument(form):
    network = Joint(form).eval()
    t1, flair = torch.rand(1, 1, 6, 6), torch.rand(1, 2, 6, 6)
    target, methods = Box(1, (0, 0), (3, 3)), [Saliency(abs=False), Occlusion(window=3, per_channel=True)]
    result = list(Explainer(network, inputs_as=form)({"t1": t1, "flair": flair}, methods, [target]))
    assert [a.record["input"] for a in result] == ["t1", "flair"] * 2
    x, y = t1.clone().requires_grad_(True), flair.clone().requires_grad_(True)
    network.requires_grad_(False)
    out = network({"t1": x, "flair": y} if form == "dict" else [x, y])
    for a, g in zip(result, torch.autograd.grad(out[0, 1, :3, :3].sum(), (x, y))):
        assert torch.allclose(a.map.as_tensor(), g[0], rtol=1e-5, atol=1e-7)
    with pytest.raises(UsageError, match="inputs_as"):
        list(Explainer(network, inputs_as=form)(t1, [Saliency()], [target]))


@pytest.mark.parametrize("form", ["dict", "list"])
def test_inputs_in_one_argument_that_are_not_declared_are_refused_by_name(form):
    inputs = {"t1": torch.rand(1, 1, 6, 6), "flair": torch.rand(1, 2, 6, 6)}
    with pytest.raises(NetworkError, match="inputs_as"):
        list(Explainer(Joint(form).eval())(inputs, [Saliency()], [Box(1, (0, 0), (3, 3))]))


def test_sparse_images_are_refused():
    dense = torch.rand(1, 1, 6, 6)
    for image in (dense.to_sparse(), {"t1": dense, "flair": dense.to_sparse()}):
        with pytest.raises(InputError, match="sparse"):
            list(Explainer(nn.Conv2d(1, 2, 1))(image, [Saliency()], [Box(1, (0, 0), (3, 3))]))


def test_weights_that_are_not_initialised_are_refused_by_name():
    network = nn.Sequential(nn.LazyConv2d(2, 1))
    with pytest.raises(NetworkError, match=r"not initialised \(0\.weight, 0\.bias\)"):
        Explainer(network)
    network(IMAGE)
    assert Explainer(network) is not None


def test_outputs_that_are_no_real_numbers_are_refused_or_warned_of():
    class Typed(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.conv, self.kind = nn.Conv2d(1, 2, 1), kind

        def forward(self, x):
            return self.kind(self.conv(x))

    method, target = Occlusion(window=3, baseline=0.0), Box(0, (0, 0), (3, 3))
    with pytest.raises(NetworkError, match="complex"):
        list(Explainer(Typed(lambda y: torch.complex(y, y)))(IMAGE, [method], [target]))
    for kind, expected in ((lambda y: (100 * y).long(), True), (lambda y: 100 * y, False)):
        result = only(Explainer(Typed(kind))(IMAGE, [method], [target]))
        assert any("integers (int64)" in w for w in result.record["warnings"]) is expected


def test_a_wrapper_reads_probabilities_as_such():
    wrapper = TargetWrapper(Lesion(nn.Sigmoid()).eval(), MultiClassMask(0)).freeze(IMAGE)
    assert wrapper.scores[0][0].voxels == 9
    assert float(wrapper(IMAGE)) == pytest.approx(9 * float(torch.sigmoid(torch.tensor(4.0))), rel=1e-5)


class Picky(Lesion):
    """Accepts windows of 8 x 8 only, as its own inferer gives them."""

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != (8, 8):
            raise ValueError("not my size")
        return super().forward(x)


class Corners:
    """An inferer that this package does not know: four windows of 8 x 8."""

    def __call__(self, inputs: Tensor, network, *args, **kwargs) -> Tensor:
        parts = [[network(inputs[..., i : i + 8, j : j + 8]) for j in (0, 8)] for i in (0, 8)]
        return torch.cat([torch.cat(row, -1) for row in parts], -2)


def test_a_network_that_cannot_be_examined_is_not_checked():
    network = Picky(nn.Sigmoid()).eval()
    image = torch.zeros(1, 1, 16, 16)
    image[..., 3:6, 3:6] = 4.0
    record = only(Explainer(network, Corners())(image, [Saliency()], [MultiClassMask(0)])).record
    (check,) = [c for c in record["checks"] if c["check"] == "head"]
    assert check["verdict"] == "not checked"
    assert "not my size" in check["text"]
    assert not record["head"]["certain"]
    record = only(Explainer(network, Corners(), head="sigmoid inside")(image, [Saliency()], [MultiClassMask(0)])).record
    assert record["target_voxels"] == 9
