"""The public interface: cases, inputs, shared passes, isolation, records."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import weights_hash
from esegeta_monai.errors import InputError, NetworkError, TargetError, UsageError
from esegeta_monai.methods import (
    GradCam,
    IntegratedGradients,
    Occlusion,
    Saliency,
    ScoreCam,
    SmoothGrad,
)
from esegeta_monai.methods.base import Method
from esegeta_monai.targets import Box, ClassScore, LayerNeuron, MultiClassMask, ThresholdMask
from esegeta_monai.utils.files import strict_json
from tests.explain.support import RECORDED, SLIDING, Broken, NotFinite, Spy, autograd, image, only

# ---- the documented interface -----------------------------------------------------------------------------------


def test_the_public_interface() -> None:
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


def test_a_classifier_records_its_prediction() -> None:
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


@pytest.mark.parametrize("shape", [(12, 12, 12), (1, 1, 12), (2, 1, 4, 4, 4, 4)])
def test_images_of_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"image must be a tensor \(B, C, \*spatial\)"):
        list(Explainer(Spy())(torch.zeros(shape), [Saliency()], [MultiClassMask(1)]))


# ---- passes, time, seeds ------------------------------------------------------------------------------------------


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


def test_on_error_raise_is_the_default() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(Explainer(Spy(), SLIDING)(image(), [Broken()], [MultiClassMask(1)]))
    with pytest.raises(TargetError, match="class_index=7"):
        list(Explainer(Spy(), SLIDING)(image(), [Saliency()], [MultiClassMask(7)]))
    with pytest.raises(UsageError, match="give 'raise' or 'record'"):
        Explainer(Spy(), on_error="ignore")  # type: ignore[arg-type]


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


# ---- what decides -------------------------------------------------------------------------------------------------


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
def test_the_record_has_all_that_a_map_depends_on(field: str, change: dict[str, Any]) -> None:
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
