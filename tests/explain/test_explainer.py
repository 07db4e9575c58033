"""The public interface: cases, inputs, shared passes, isolation, records."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SimpleInferer, SliceInferer, SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Attribution, Explainer
from esegeta_monai.engine.network.state import weights_hash
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import InputError, MethodError, MethodTimeout, NetworkError, TargetError, UsageError
from esegeta_monai.methods import (
    BlurIG,
    Explained,
    GradCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    Occlusion,
    Rise,
    Saliency,
    ScoreCam,
    SmoothGrad,
)
from esegeta_monai.methods.base import Method
from esegeta_monai.targets import Box, ClassScore, LayerNeuron, MultiClassMask, PredictedClasses, ThresholdMask, Voxel
from esegeta_monai.utils.files import strict_json

RECORDED = {  # docs/design.md, "Recorded"
    *("status", "method", "parameters", "target", "target_voxels", "sum", "completeness_gap", "blend_deviation"),
    *("value", "baseline_value", "predicted_class", "predicted_probability", "class_name", "units", "coverage"),
    *("windows_used", "windows_total", "seconds", "peak_memory_bytes", "warnings", "versions"),
}
SLIDING = SlidingWindowInferer((8, 8, 8), 2, 0.5, "gaussian")


class Spy(nn.Module):
    """A small segmenter that counts the images it has seen."""

    def __init__(self, channels: int = 1, dims: int = 3, classes: int = 2) -> None:
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.last = conv(channels, 4, 3, padding=1), conv(4, classes, 3, padding=1)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.last(torch.relu(self.first(x)))


def image(batch: int = 1, channels: int = 1, size: int = 12, dims: int = 3) -> Tensor:
    return torch.rand((batch, channels, *[size] * dims), generator=torch.Generator().manual_seed(7))


def only(result: Any) -> Attribution:
    (attribution,) = result
    return attribution


def autograd(network: nn.Module, x: Tensor, inferer: Any, class_index: int) -> Tensor:
    x = x.clone().requires_grad_(True)
    out = inferer(x, network)
    (gradient,) = torch.autograd.grad(out[0, class_index][out[0].argmax(0) == class_index].sum(), x)
    return gradient[0]


# ---- the documented interface -----------------------------------------------------------------------------------


def test_the_public_face() -> None:
    network = Spy()
    x = image()
    explainer = Explainer(network, inferer=SlidingWindowInferer((8, 8, 8), 4, 0.5, "gaussian"), device="cpu", amp=False)
    result = []
    for attribution in explainer(x, methods=[Saliency(), IntegratedGradients(n_steps=32)], targets=[MultiClassMask(1)]):
        assert isinstance(attribution.map, MetaTensor)
        assert attribution.map.shape == (1, 12, 12, 12)
        assert attribution.map.dtype == torch.float32
        assert attribution.target.name == "MultiClassMask"
        assert attribution.case == 0
        assert attribution.record["status"] == attribution.status == "ok"
        result.append(attribution.method.name)
    assert result == ["Saliency", "IntegratedGradients"]
    expected = autograd(network, x, explainer.settings.inferer, 1)
    actual = only(explainer(x, [Saliency(abs=False)], [MultiClassMask(1)])).map
    assert (actual.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_every_record_is_json_ready_and_complete() -> None:
    explainer = Explainer(Spy(), SLIDING, on_error="record", time_limit=100)
    methods = [Saliency(), IntegratedGradients(n_steps=4), GradCam(), Occlusion(), GradCam(layer="nowhere")]
    targets = [MultiClassMask(1), ThresholdMask(1e9, value="raw"), MultiClassMask(9)]
    result = list(explainer(image(), methods, targets))
    assert len(result) == 15
    assert {a.status for a in result} == {"ok", "empty_target", "failed"}
    for a in result:
        assert set(a.record) >= RECORDED
        assert json.loads(json.dumps(a.record, allow_nan=False)) == json.loads(strict_json(a.record))
        assert (a.map is None) == (a.status != "ok")
        assert a.status == "ok" or a.record["reason"]
    finished = {a.method.name: a.record for a in result if a.status == "ok"}
    for record in finished.values():
        assert record["blend_deviation"] < 1e-6  # whether or not the method itself sweeps over the windows
        assert record["windows_used"] <= record["windows_total"] == 8
        assert record["coverage"] == 1.0
        assert record["value"] == finished["Saliency"]["value"]
        assert record["peak_memory_bytes"] > 1e7
        assert record["inferer"]["roi_size"] == [8, 8, 8]
    ig = finished["IntegratedGradients"]
    assert ig["sum"] == pytest.approx(ig["value"] - ig["baseline_value"], rel=2 * ig["completeness_gap"])


def test_a_classifier_says_what_it_predicted() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.LazyLinear(3))
    x = image(dims=2)
    with torch.no_grad():
        probabilities = network(x).softmax(1)[0]
    explainer = Explainer(network, class_names={0: "none", 1: "small", 2: "large"})
    record = only(explainer(x, [Saliency()], [ClassScore()])).record
    best = int(probabilities.argmax())
    assert (record["predicted_class"], record["class_index"]) == (best, best)
    assert record["predicted_class_name"] == record["class_name"] == ["none", "small", "large"][best]
    assert record["predicted_probability"] == pytest.approx(float(probabilities[best]), rel=1e-6)
    both = list(explainer(x, [Saliency()], [ClassScore(top_k=2)]))
    assert [a.record["class_index"] for a in both] == probabilities.topk(2).indices.tolist()


def test_texts_and_configs_make_methods_and_targets() -> None:
    explainer = Explainer(Spy(), SLIDING)
    result = list(explainer(image(), "Saliency,occlusion(window=6)", {"_target_": "MultiClassMask", "class_index": 1}))
    assert [a.method.parameters.get("window") for a in result] == [None, 6]
    with pytest.raises(UsageError, match=r"did you mean .*Saliency"):
        list(explainer(image(), "Salience", "MultiClassMask(1)"))


# ---- cases and inputs ---------------------------------------------------------------------------------------------


def test_a_batch_is_explained_case_by_case() -> None:
    explainer, x = Explainer(Spy(), SLIDING), image(3)
    together = list(explainer(x, [Saliency(), GradCam()], [MultiClassMask(1)]))
    assert [a.case for a in together] == [0, 0, 1, 1, 2, 2]
    for i in range(3):
        for a, b in zip(together[2 * i : 2 * i + 2], explainer(x[i : i + 1], "Saliency,GradCam", "MultiClassMask(1)")):
            assert torch.equal(a.map, b.map)


def test_a_batch_of_metatensors_keeps_each_place() -> None:
    singles = [MetaTensor(image()[0], affine=torch.diag(torch.tensor([s, s, s, 1.0]))) for s in (1.0, 2.0)]
    from monai.data import list_data_collate

    batch = list_data_collate([{"image": s} for s in singles])["image"]
    result = list(Explainer(Spy(), SLIDING)(batch, [Saliency()], [MultiClassMask(1)]))
    assert [float(a.map.affine[0, 0]) for a in result] == [1.0, 2.0]


def test_a_bad_case_leaves_the_others() -> None:
    x = image(3)
    x[1, 0, 3, 3, 3] = torch.nan
    explainer = Explainer(Spy(), SLIDING, on_error="record")
    result = list(explainer(x, [Saliency(), GradCam()], [MultiClassMask(1)]))
    assert [(a.case, a.status) for a in result] == [
        *[(0, "ok")] * 2,
        *[(1, "failed")] * 2,
        *[(2, "ok")] * 2,
    ]
    assert "NaN" in result[2].record["reason"]
    assert isinstance(result[2].error, InputError)
    assert set(result[2].record) >= RECORDED
    with pytest.raises(InputError, match="image 1: 1 of 1728 voxels are NaN"):
        list(Explainer(Spy(), SLIDING)(x, [Saliency()], [MultiClassMask(1)]))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Spy(channels=3)

    def forward(self, x: Tensor, *, pet: Tensor) -> Tensor:
        return self.net(torch.cat([x, 2 * pet], 1))


def test_several_image_inputs_get_a_map_each() -> None:
    network, mr, pet = TwoInputs(), image(1, 2), image(1, 1) + 0.5
    explainer = Explainer(network, SLIDING)
    result = list(explainer({"mr": mr, "pet": pet}, [Saliency(abs=False), GradCam()], [MultiClassMask(1)]))
    assert [(a.method.name, a.input) for a in result] == [("Saliency", "mr"), ("Saliency", "pet"), ("GradCam", None)]
    a, b = mr.clone().requires_grad_(True), pet.clone().requires_grad_(True)
    joined = SLIDING(torch.cat([a, b], 1), lambda x: network(x[:, :2], pet=x[:, 2:]))
    score = joined[0, 1][joined[0].argmax(0) == 1].sum()
    for attribution, expected in zip(result, torch.autograd.grad(score, [a, b])):
        assert attribution.map.shape == expected[0].shape
        assert (attribution.map.as_tensor() - expected[0]).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(InputError, match="'pet' has shape"):
        list(explainer({"mr": mr, "pet": pet[..., :6]}, [Saliency()], [MultiClassMask(1)]))


class WithMore(Spy):
    """Further inputs: one per case, one for all, and MONAI's condition volume."""

    def forward(self, x: Tensor, scale: Any = 1.0, *, shift: Any = 0.0, condition: Tensor | None = None) -> Tensor:
        out = super().forward(x) * scale + shift
        return out if condition is None else out * condition


def test_network_args_and_kwargs_are_passed_through() -> None:
    x, scale, shift = image(2), torch.tensor([[2.0], [3.0]]).reshape(2, 1, 1, 1, 1), torch.tensor(0.25)
    explainer = Explainer(WithMore(), SimpleInferer())
    more = {"network_args": [scale], "network_kwargs": {"shift": shift}}
    result = list(explainer(x, [Saliency(abs=False), IntegratedGradients(n_steps=3)], [MultiClassMask(1)], **more))
    for a in result[::2]:
        i = a.case
        expected = autograd(WithMore(), x[i : i + 1], lambda z, net, i=i: net(z, scale[i], shift=shift), 1)
        assert (a.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_condition_is_cut_to_the_windows_as_monai_does() -> None:
    x, condition = image(), image(1, 1) + 0.5
    network = WithMore()
    explainer = Explainer(network, SLIDING)
    result = only(explainer(x, [Saliency(abs=False)], [MultiClassMask(1)], network_kwargs={"condition": condition}))
    inferer = lambda z, net: SLIDING(z, net, condition=condition)  # noqa: E731
    expected = autograd(network, x, inferer, 1)
    assert (result.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert result.record["blend_deviation"] < 1e-6


@pytest.mark.parametrize("shape", [(12, 12, 12), (1, 1, 12), (2, 1, 4, 4, 4, 4)])
def test_images_of_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"image must be \(B, C, \*spatial\)"):
        list(Explainer(Spy())(torch.zeros(shape), [Saliency()], [MultiClassMask(1)]))


class Inflated(nn.Module):
    """2D images in, 3D convolutions inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None])[:, :, 0]


@pytest.mark.parametrize("given", [False, True])
def test_a_volume_without_its_batch_axis_is_refused(given: bool) -> None:
    """torch takes it for one image without a batch: the map had the volume's first axis for channels."""
    network, image = nn.Conv3d(1, 1, 3, padding=1), torch.rand(1, 6, 6, 6)
    prediction = network(image).detach() if given else None
    target = ThresholdMask(-100.0, 0, value="raw")
    with pytest.raises(InputError, match=r"has shape \(6, 6, 6\).*convolutions are 3D.*EnsureChannelFirstd"):
        list(Explainer(network)(image, [Saliency()], [target], prediction=prediction))
    assert not network._forward_pre_hooks
    (result,) = Explainer(network)(image[None], [Saliency()], [target])
    assert tuple(result.map.shape) == (1, 6, 6, 6)
    (flat,) = Explainer(inflated := Inflated())(torch.rand(1, 1, 6, 6), [Saliency()], [ThresholdMask(-100.0, 0)])
    assert tuple(flat.map.shape) == (1, 6, 6)
    assert not inflated.conv._forward_pre_hooks


def test_data_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match="data has 1 entries for 2 images"):
        list(Explainer(Spy(), SLIDING)(image(2), [Saliency()], [MultiClassMask(1)], data=[{}]))


# ---- passes, time, seeds ------------------------------------------------------------------------------------------


def test_methods_that_look_at_the_same_windows_share_passes() -> None:
    """Saliency, InputXGradient, GradCam and LayerActivation cost no more window passes than GradCam alone."""
    costs = []
    for methods in ([GradCam(layer="first")], [Saliency(), InputXGradient(), GradCam(layer="first"),
                                               LayerActivation(layer="first")]):  # fmt: skip
        network = Spy()
        prediction = SLIDING(image(), network).detach()
        network.seen = 0
        result = list(Explainer(network, SLIDING)(image(), methods, [MultiClassMask(1)], prediction=prediction))
        assert all(a.status == "ok" for a in result)
        assert result[0].record["window_passes"] == network.seen
        costs.append(network.seen)
    assert costs[1] == costs[0] > 0
    assert result[0].record["passes_shared_with"] == ["Saliency", "InputXGradient", "GradCam", "LayerActivation"]


def test_a_given_prediction_is_not_computed_again() -> None:
    network = Spy()
    prediction = SLIDING(image(), network).detach()
    corner = Box(1, (0, 0, 0), (2, 2, 2))
    counts = []
    for known in (prediction, None):
        network.seen = 0
        result = only(Explainer(network, SLIDING)(image(), [Saliency()], [corner], prediction=known))
        counts.append(network.seen)
    assert counts == [1, 9]  # one window sees the corner; the prediction takes eight
    assert result.record["windows_used"] == 1


class Misses(Method):
    """A map with a completeness gap for each target."""

    produces = "input map"
    additive = True
    units = "target per voxel"
    gap_advice = "take more of them"
    gaps: Sequence[float | None] = ()

    def attribute(self, objective: Objective) -> Explained:
        return Explained(objective.new_maps() + 1, {"completeness_gap": list(self.gaps)})


def test_a_completeness_gap_above_five_percent_is_warned_of_whatever_the_method() -> None:
    methods = [Misses([0.06, None]), Misses([0.04, 0.05], name="fine")]
    result = list(Explainer(Spy(), SLIDING)(image(), methods, [MultiClassMask(1), MultiClassMask(0, name="air")]))
    reported = {w for a in result for w in a.record["warnings"]}
    assert reported == {
        "MultiClassMask-class1: Misses: the map's sum misses what it should add up to by 6 %: take more of them"
    }
    assert not any(a.record["warnings"] for a in result if a.method.name == "fine")
    short = [BlurIG(n_steps=1), IntegratedGradients(n_steps=1, method="riemann_left")]
    for a in Explainer(Spy(), SLIDING)(5 * image(), short, [Voxel(1, index=(6, 6, 6), output="log_probability")]):
        assert a.record["completeness_gap"] > 0.05
        assert any(w.startswith(f"{a.label}: {a.method.name}: ") for w in a.record["warnings"])


class Slow(Method):
    """Takes its time, looking at the clock between windows as all methods do."""

    produces = "input map"
    additive = False
    units = "target per unit of image intensity"

    def __init__(self, name: str | None = None) -> None:
        self.name = name

    def attribute(self, objective: Any) -> Tensor:
        maps = objective.new_maps()
        for _ in range(10_000):
            maps += objective.gradient(objective.image[None]).maps[:, 0]
        return maps


def test_time_limit_ends_a_method_and_the_next_goes_on() -> None:
    explainer = Explainer(Spy(), SLIDING, time_limit=0.3, on_error="record")
    result = list(explainer(image(), [Slow(), Occlusion(window=8)], [MultiClassMask(1)]))
    assert [a.status for a in result] == ["timeout", "ok"]
    assert "time limit of 0.3 s" in result[0].record["reason"]
    assert 0.3 <= result[0].record["seconds"] < 5
    with pytest.raises(MethodTimeout):
        list(Explainer(Spy(), SLIDING, time_limit=0.05)(image(), [Slow()], [MultiClassMask(1)]))


def test_the_seed_makes_every_draw_repeatable() -> None:
    methods = [SmoothGrad(n_samples=3), IntegratedGradients(n_steps=2, baseline="noise")]

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(torch.seed() % 1000)  # the global state must not matter
        return [a.map for a in Explainer(Spy(), SLIDING, seed=seed)(image(), methods, [MultiClassMask(1)])]

    first, again, other = run(5), run(5), run(6)
    for a, b, c in zip(first, again, other):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


# ---- failures -----------------------------------------------------------------------------------------------------


class Broken(Saliency):
    def attribute(self, objective: Any) -> Any:
        objective.gradient(objective.image[None])
        raise ZeroDivisionError("a bug")


class NotFinite(Saliency):
    def attribute(self, objective: Any) -> Tensor:
        maps = objective.new_maps()
        maps[..., 0] = torch.nan
        return maps


class Nothing(Saliency):
    def attribute(self, objective: Any) -> Tensor:
        return objective.new_maps()


def test_on_error_record_keeps_what_works() -> None:
    result = list(
        Explainer(Spy(), SLIDING, on_error="record")(
            image(), [Broken(), Saliency()], [MultiClassMask(1), MultiClassMask(7)]
        )
    )
    by = {(a.method.name, a.target.parameters["class_index"]): a for a in result}
    assert {k: a.status for k, a in by.items()} == {
        ("Broken", 1): "failed",
        ("Broken", 7): "failed",
        ("Saliency", 1): "ok",
        ("Saliency", 7): "failed",
    }
    assert by["Broken", 1].record["reason"] == "ZeroDivisionError: a bug"
    assert isinstance(by["Broken", 1].error, ZeroDivisionError)
    assert isinstance(by["Saliency", 7].error, TargetError)


def test_on_error_raise_is_the_default() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(Explainer(Spy(), SLIDING)(image(), [Broken()], [MultiClassMask(1)]))
    with pytest.raises(TargetError, match="class_index=7"):
        list(Explainer(Spy(), SLIDING)(image(), [Saliency()], [MultiClassMask(7)]))
    with pytest.raises(UsageError, match="give 'raise' or 'record'"):
        Explainer(Spy(), on_error="ignore")  # type: ignore[arg-type]


def test_maps_that_are_not_finite_are_never_ok() -> None:
    result = only(Explainer(Spy(), SLIDING, on_error="record")(image(), [NotFinite()], [MultiClassMask(1)]))
    assert (result.status, result.map, result.record["sum"]) == ("failed", None, None)
    assert "144 of 1728 values that are not finite" in result.record["reason"]
    with pytest.raises(MethodError, match="not finite"):
        list(Explainer(Spy(), SLIDING)(image(), [NotFinite()], [MultiClassMask(1)]))


def test_a_map_of_zeros_is_called_zero() -> None:
    result = only(Explainer(Spy(), SLIDING)(image(), [Nothing()], [MultiClassMask(1)]))
    assert (result.status, result.record["sum"]) == ("zero", 0.0)
    assert result.map is not None
    assert any("zero everywhere" in w for w in result.record["warnings"])


@pytest.mark.parametrize("methods", [[Saliency(), Occlusion()], [Broken()], [NotFinite()], [GradCam(layer="nowhere")]])
def test_image_and_network_stay_as_they_came(methods: list[Method]) -> None:
    network, x = Spy().train(), image()
    network.first.eval()
    network.last.weight.requires_grad_(False)
    network.first.weight.grad = torch.ones_like(network.first.weight)
    before, weights = x.clone(), weights_hash(network)
    list(Explainer(network, SLIDING, on_error="record")(x, methods, [MultiClassMask(1)]))
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert weights_hash(network) == weights
    assert [m.training for m in network.modules()] == [True, False, True]
    assert [p.requires_grad for p in network.parameters()] == [True, True, False, True]
    assert bool((network.first.weight.grad == 1).all())
    assert all(not m._forward_hooks and not m._backward_hooks for m in network.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(NetworkError, match=r"call network\.float\(\) and use amp=True"):
        Explainer(Spy().to(dtype))


def test_a_network_elsewhere_is_refused() -> None:
    with pytest.raises(NetworkError, match=r"network\.to\('cuda:0'\)"):
        Explainer(Spy(), device="cuda:0")
    with pytest.raises(NetworkError, match="the network is on meta"):
        Explainer(Spy().to("meta"), device="cpu")


def test_amp_is_recorded_and_close() -> None:
    """Smooth throughout: at the kink of a ReLU, or where argmax decides, rounding would flip whole voxels."""
    network = nn.Sequential(Spy().first, nn.SiLU(), Spy().last)
    plain, under = (
        only(Explainer(network, SLIDING, amp=amp)(image(), [Saliency(abs=False)], [Box(1, (2, 2, 2), (9, 9, 9))]))
        for amp in (False, True)
    )
    assert (plain.record["amp"], under.record["amp"]) == (None, "torch.bfloat16")
    assert under.map.dtype == torch.float32
    difference = (plain.map - under.map).abs().max() / plain.map.abs().max()
    assert 0 < difference < 0.05


def test_an_outer_autocast_does_not_leak_in() -> None:
    """A trainer calls handlers under its own autocast; the explainer's own setting counts."""
    plain = only(Explainer(Spy(), SLIDING)(image(), [Saliency()], [MultiClassMask(1)]))
    with torch.autocast("cpu", torch.bfloat16):
        inside = only(Explainer(Spy(), SLIDING)(image(), [Saliency()], [MultiClassMask(1)]))
    assert torch.equal(plain.map, inside.map)


# ---- inferers and networks ----------------------------------------------------------------------------------------


class Mirrored(Inferer):
    """An inferer that nobody knows: the mean over the image and its mirror image."""

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        return (network(inputs) + network(inputs.flip(2)).flip(2)) / 2


def test_unknown_inferers_are_one_window_with_a_warning() -> None:
    network = Spy()
    result = only(Explainer(network, Mirrored())(image(), [Saliency(abs=False)], [MultiClassMask(1)]))
    assert any("Mirrored" in w and "memory" in w for w in result.record["warnings"])
    assert result.record["windows_total"] == 1
    expected = autograd(network, image(), Mirrored(), 1)
    assert (result.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_record_has_the_inferer_as_it_was_given() -> None:
    inferer = SliceInferer(spatial_dim=2, roi_size=(8, 8))  # MONAI adds an axis to its roi_size when it runs
    result = only(Explainer(Spy(dims=2), inferer)(image(), [Saliency()], [MultiClassMask(0)]))
    assert result.record["inferer"]["roi_size"] == [8, 8]


def test_slice_inferer_explains_volumes_by_a_flat_network() -> None:
    network, inferer = Spy(dims=2), SliceInferer(spatial_dim=2, roi_size=(8, 8), sw_batch_size=3, overlap=0.25)
    result = only(Explainer(network, inferer)(image(), [Saliency(abs=False)], [MultiClassMask(0)]))
    expected = autograd(network, image(), inferer, 0)
    assert (result.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_torchscript_runs_black_boxes_and_refuses_gradients() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = Spy().first

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.conv(x))

    scripted = torch.jit.script(Plain())
    plain = list(Explainer(Plain(), SLIDING)(image(), [Occlusion(window=6)], [MultiClassMask(1)]))
    boxes = list(Explainer(scripted, SLIDING)(image(), [Occlusion(window=6)], [MultiClassMask(1)]))
    torch.testing.assert_close(boxes[0].map, plain[0].map, rtol=0, atol=1e-5 * float(plain[0].map.abs().max()))
    with pytest.raises(NetworkError, match=r"Saliency: gradients or layers are needed.*such as Occlusion"):
        list(Explainer(scripted, SLIDING)(image(), [Saliency(), Occlusion()], [MultiClassMask(1)]))
    mixed = Explainer(scripted, SLIDING, on_error="record")(image(), [Saliency(), Occlusion(6)], [MultiClassMask(1)])
    assert {a.method.name: a.status for a in mixed} == {"Saliency": "failed", "Occlusion": "ok"}
    with pytest.raises(NetworkError, match=r"ScoreCam: gradients or layers are needed"):
        list(Explainer(scripted, SLIDING)(image(), [ScoreCam(layer="conv")], [MultiClassMask(1)]))
    with pytest.raises(NetworkError, match="TorchScript network does not show its layers"):
        list(Explainer(scripted, SLIDING)(image(), [Occlusion(6)], [LayerNeuron("conv", 0, index=(2, 2))]))


def test_double_precision_networks_give_double_precision_maps() -> None:
    result = only(Explainer(Spy().double(), SLIDING)(image(), [Saliency()], [MultiClassMask(1)]))
    assert result.map.dtype == torch.float64


def test_predictions_that_are_not_finite_are_refused() -> None:
    network = Spy()
    with torch.no_grad():
        network.last.bias.fill_(torch.inf)
    with pytest.raises(NetworkError, match="prediction has values that are NaN or infinite"):
        list(Explainer(network, SLIDING)(image(), [Saliency()], [PredictedClasses()]))


# ---- what decides -------------------------------------------------------------------------------------------------


def test_skip_is_asked_before_anything_is_computed() -> None:
    network = Spy()
    prediction = SLIDING(image(), network).detach()
    network.seen = 0
    asked: list[Attribution] = []

    def skip(attribution: Attribution) -> bool:
        assert network.seen == 0
        asked.append(attribution)
        return attribution.method.name == "Saliency" or attribution.label.endswith("class0")

    options = {"prediction": prediction, "skip": skip}
    result = list(
        Explainer(network, SLIDING)(
            image(), [Saliency(), GradCam()], ["MultiClassMask(0)", "MultiClassMask(1)"], **options
        )
    )
    assert [(a.method.name, a.label) for a in result] == [("GradCam", "MultiClassMask-class1")]
    assert len(asked) == 4
    assert all(a.map is None and set(a.record) >= RECORDED for a in asked)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("image_sha256", {"x": image() + 1e-6}),
        ("inferer", {"inferer": SlidingWindowInferer((8, 8, 8), 2, 0.25, "gaussian")}),
        ("amp", {"amp": True}),
        ("network", {"network": nn.Sequential(Spy(), nn.LeakyReLU(0.2))}),
        ("seed", {"seed": 1}),
        ("target_sha256", {"target": Box(1, (0, 0, 0), (3, 3, 2))}),
        ("network_affine", {"x": MetaTensor(image(), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))}),
    ],
)
def test_the_record_tells_what_a_map_depends_on(field: str, change: dict[str, Any]) -> None:
    def record(
        x: Tensor | None = None,
        network: nn.Module | None = None,
        inferer: Any = SLIDING,
        target: Any = None,
        **more: Any,
    ) -> dict[str, Any]:
        network = network or nn.Sequential(Spy(), nn.LeakyReLU(0.1))
        target = target or Box(1, (0, 0, 0), (3, 2, 3))
        return only(Explainer(network, inferer, **more)(image() if x is None else x, [Saliency()], [target])).record

    assert record()[field] == record()[field]
    assert record(**change)[field] != record()[field]


def test_how_windows_run_is_not_what_they_give() -> None:
    """Batch size, progress bar and device of the windows do not make another map."""
    one = only(Explainer(Spy(), SLIDING)(image(), [Saliency()], [MultiClassMask(1)])).record["inferer"]
    other = SlidingWindowInferer((8, 8, 8), 1, 0.5, "gaussian", progress=False, sw_device="cpu", device="cpu")
    assert one == only(Explainer(Spy(), other)(image(), [Saliency()], [MultiClassMask(1)])).record["inferer"]


def test_warnings_are_recorded_not_lost() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = only(Explainer(Spy(), Mirrored())(image(), [Saliency()], [MultiClassMask(1)]))
    assert result.record["warnings"]


@pytest.mark.parametrize("bad", [Occlusion(4, baseline="gone.nii.gz"), Rise(10, grid=(2, 2))])
def test_a_progress_bar_does_not_spread_a_failure(bad: Method, capsys: pytest.CaptureFixture[str]) -> None:
    """The passes are counted before the run: what fails there failed all methods of the case."""
    explainer = Explainer(Spy(), SLIDING, on_error="record", progress=True)
    methods = [bad, Saliency(), Occlusion(6, name="second")]
    result = {a.method.name: a for a in explainer(image(), methods, [Voxel(1, index=(6, 6, 6))])}
    assert {n: a.status for n, a in result.items()} == {bad.name: "failed", "Saliency": "ok", "second": "ok"}
    passes = result["second"].record["window_passes"]
    assert f"{passes}/{passes} [" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"time_limit": "600"}, "time_limit='600': give a number or None above 0"),
        ({"time_limit": 0}, "time_limit=0: give a number"),
        ({"time_limit": float("nan")}, "time_limit=nan"),
        ({"window_batch": 0}, "window_batch=0: give a whole number or None above 0"),
        ({"window_batch": 2.5}, r"window_batch=2\.5"),
        ({"seed": -1}, "seed=-1: give a whole number above -1"),
        ({"seed": 2**70}, "seed="),
        ({"seed": "three"}, "seed='three'"),
    ],
)
def test_settings_that_are_no_such_numbers_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Explainer(Spy(), SLIDING, **setting)


@pytest.mark.parametrize(
    "wrong", [np.zeros((1, 1, 8, 8, 8)), "scan.nii.gz", torch.zeros(8, 8, 8), torch.zeros(1, 1, 8, 0)]
)
def test_what_is_no_image_is_refused(wrong: Any) -> None:
    with pytest.raises(InputError, match="image must be"):
        list(Explainer(Spy(), SLIDING)(wrong, [Saliency()], [MultiClassMask(1)]))
