"""The memory format: rule, request and measurement; the maps stay those of contiguous windows."""

from __future__ import annotations

import json

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.memory_format import as_format, format_by_rule, same_numbers
from esegeta_monai.errors import UsageError
from esegeta_monai.explain import formats
from esegeta_monai.explain.formats import FormatStore

METHODS = ["Saliency", "GradCam", "IntegratedGradients(n_steps=3)", "Occlusion(window=8)", "LRP", "DeepLIFT"]


class Seen(nn.Module):
    """A network that records the strides in which its second convolution gets a batch."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.second = kind(2, 16, 3, padding=1), kind(16, 2, 3, padding=1)
        self.channels_last: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        self.channels_last.append(x.stride(1) == 1)
        return self.second(x)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("asked", [None, "contiguous", "channels_last"])
def test_the_network_gets_the_format_and_its_weights_back(dims: int, asked: str | None) -> None:
    torch.manual_seed(0)
    network = Seen(dims)
    stride = network.second.weight.stride()
    explainer = Explainer(network, SlidingWindowInferer((8,) * dims, 2), checks=False, memory_format=asked)
    (attribution,) = explainer(torch.rand(1, 2, *(12,) * dims), ["Saliency"], ["MultiClassMask(1)"])
    used = "contiguous" if asked == "contiguous" else "channels_last"
    assert attribution.record["memory_format"]["used"] == used
    assert network.channels_last[-1] == (used == "channels_last")
    assert network.second.weight.stride() == stride


def test_maps_are_those_of_contiguous_windows() -> None:
    torch.manual_seed(0)
    network = UNet(3, 2, 2, (16, 32), (2,), num_res_units=1, norm="batch").eval()
    image = torch.rand(1, 2, 24, 24, 24)
    maps = {}
    for asked in ("contiguous", "channels_last"):
        explainer = Explainer(network, SlidingWindowInferer((16,) * 3, 2), checks=False, memory_format=asked)
        attributions = explainer(image, METHODS, ["MultiClassMask(1)"])
        assert {a.record["memory_format"]["used"] for a in attributions} == {asked}
        maps[asked] = [a.map.as_tensor() for a in attributions]
    for name, a, b in zip(METHODS, *maps.values()):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max(), name


def test_other_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Order(nn.Conv3d):
        """A network whose result depends on the order of its input in memory."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.001 if x.stride(1) == 1 else 1.0)

    torch.manual_seed(0)
    explainer = Explainer(Order(2, 16, 3, padding=1), checks=False)
    (attribution,) = explainer(torch.rand(1, 2, 8, 8, 8), ["Saliency"], ["MultiClassMask(1)"])
    entry = attribution.record["memory_format"]
    assert entry["used"] == "contiguous"
    assert "error of F grows" in entry["reason"]


def test_a_network_that_needs_contiguous_tensors_gets_them() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 16, 3, padding=1), nn.Linear(16 * 64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).view(len(x), -1))

    torch.manual_seed(0)
    explainer = Explainer(Views(), memory_format="channels_last")
    (attribution,) = explainer(torch.rand(1, 2, 8, 8), ["Saliency"], ["ClassScore(1)"])
    entry = attribution.record["memory_format"]
    assert (entry["used"], attribution.status) == ("contiguous", "ok")
    assert "the comparison fails" in entry["reason"]


def test_a_measured_choice_is_stored_and_used_again(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, image = nn.Conv3d(2, 16, 3, padding=1), torch.rand(1, 2, 8, 8, 8)
    measured = []

    def faster(*args: object, **kwargs: object) -> tuple[bool, str]:
        measured.append(True)
        return len(measured) == 1, "as the test says"

    monkeypatch.setattr(formats, "faster", faster)
    for _ in range(2):  # a resumed run has a new explainer
        explainer = Explainer(network, checks=False, memory_format="auto")
        explainer.settings.formats.path = tmp_path / "memory_format.json"
        (attribution,) = explainer(image, ["Saliency"], ["MultiClassMask(1)"])
        assert attribution.record["memory_format"] == {
            "used": "channels_last",
            "by": "measurement",
            "reason": "as the test says",
        }
    assert len(measured) == 1
    assert len(json.loads((tmp_path / "memory_format.json").read_text(encoding="utf-8"))) == 1
    network.weight.data.mul_(2)  # other weights are another network
    explainer(image, ["Saliency"], ["MultiClassMask(1)"])[0]
    assert len(measured) == 2


def test_the_rule_does_not_measure() -> None:
    cpu = torch.device("cpu")
    slow = nn.Sequential(nn.Conv3d(1, 16, 3), nn.InstanceNorm3d(16))
    assert format_by_rule(slow, cpu, torch.float32, False).used == "contiguous"
    assert format_by_rule(nn.Conv2d(1, 16, 3), cpu, torch.float32, True).used == "contiguous"
    assert format_by_rule(nn.Conv2d(1, 16, 3), cpu, torch.float64, False).used == "contiguous"
    assert format_by_rule(nn.Conv2d(1, 16, 3), torch.device("cuda"), torch.float32, False).used == "contiguous"
    assert format_by_rule(nn.Conv2d(1, 8, 3), cpu, torch.float32, False).used == "contiguous"


def test_errors_are_compared_with_float64() -> None:
    truth = [torch.ones(10, dtype=torch.float64), torch.ones(1, 10, dtype=torch.float64)]
    shifts = {"contiguous": 1e-5, "channels_last": 1.9e-5}

    def evaluate(kind: str) -> list[Tensor]:
        return [t + shifts[kind] for t in truth]

    assert same_numbers(evaluate, lambda: truth) is None
    shifts["channels_last"] = 2.2e-5
    assert same_numbers(evaluate, lambda: truth) is not None
    shifts.update(contiguous=1e-9, channels_last=9e-7)
    assert same_numbers(evaluate, lambda: truth) is None


def test_a_wrong_format_is_refused() -> None:
    with pytest.raises(UsageError, match="channels_last"):
        Explainer(nn.Conv2d(1, 2, 3), memory_format="nhwc")


def test_weights_of_other_layers_keep_their_order() -> None:
    assert as_format(torch.zeros(3, 4), "channels_last").stride() == (4, 1)
    assert FormatStore().get("unknown") is None
