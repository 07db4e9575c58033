"""The findings on layers: layers that run several times, and outputs that are no map, are listed; others are not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esegeta_monai.engine.checks.layers import layer_findings
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.targets import MultiClassMask
from tests.support.objectives import objective_of
from tests.support.repeated import Encoder, Views, flip
from tests.support.tensors import noise


def findings(network: nn.Module) -> list[tuple[str, str, str]]:
    o = objective_of(network.double().eval(), noise(1, 8, 8), [MultiClassMask(1)])
    with frozen(network):
        return [(r.name, r.verdict, r.text) for r in layer_findings(o)]


def test_a_plain_network_passes():
    assert [f[:2] for f in findings(Encoder(2))] == [("layers", "passed"), ("layout", "passed")]


def test_views_are_named():
    (check, verdict, text), layout = findings(Views(Encoder(2), [flip(), flip(1)], 0.5))
    assert (check, verdict) == ("layers", "handled")
    assert text.startswith("layers 'n' run several times in a pass, on views of the window")
    assert layout[1] == "passed"


def test_steps_and_unknown_calls_are_named():
    def turned(x: Tensor) -> Tensor:
        return x[:, :, torch.arange(x.shape[2] - 1, -1, -1)]

    act = nn.ReLU()
    steps = nn.Sequential(nn.Conv2d(1, 2, 1), act, nn.Conv2d(2, 2, 1), act)
    assert "layers '1' run several times in a pass, one call on the result of another" in findings(steps)[0][2]
    text = findings(Views(Encoder(2), [flip(), (turned, turned)], 0.5))[0][2]
    assert "layers 'n' run several times in a pass, and where each call lies is not known" in text


def test_outputs_that_are_no_map_are_named():
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x)[:, :, torch.arange(8)])

    assert findings(Indexed())[1] == (
        "layout",
        "handled",
        "layers 'head' give no map, or not known to be one: layer methods refuse them",
    )
