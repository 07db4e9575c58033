"""The list of layers, and the output of one, on four kinds of networks; beside hooks of the test's own."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import SegResNet, SwinUNETR, UNet
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.window_loop import WindowedNetwork
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.network_layers import cell_of, central_window, layer_output, network_layers


def classifier() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "UNet": (lambda: UNet(3, 1, 2, (4, 8, 8), (2, 2), num_res_units=1), (16, 16, 16)),
    "SegResNet": (lambda: SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,)), (16, 16, 16)),
    "SwinUNETR": (
        lambda: SwinUNETR(in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
        (64, 64, 64),
    ),
    "classifier": (classifier, (16, 16)),
}


def windowed(name: str) -> WindowedNetwork:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    image = torch.rand(1, *shape)
    return WindowedNetwork(Model(make().eval(), image.device), image, plan_windows(SimpleInferer(), shape))


@pytest.mark.parametrize(
    "name", [n for n in NETWORKS if n != "SwinUNETR"] + [pytest.param("SwinUNETR", marks=pytest.mark.slow)]
)
def test_rows_are_what_the_modules_give(name: str) -> None:
    network = windowed(name)
    inner, seen = network.model.network, {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            copied = out.clone() if isinstance(out, Tensor) else out  # because the next layer may write into it
            seen.setdefault(name, copied)

        return hook

    handles = [module.register_forward_hook(keep(n)) for n, module in inner.named_modules() if n]
    with torch.no_grad():
        inner(network.image[None])
    for handle in handles:
        handle.remove()
    rows = network_layers(network, 0)
    assert {row.name: row.shape for row in rows} == {
        n: tuple(out.shape[1:]) for n, out in seen.items() if isinstance(out, Tensor) and out.ndim > 1
    }
    assert {row.name: row.type for row in rows}.items() <= {
        n: type(m).__name__ for n, m in inner.named_modules()
    }.items()
    convolutions = {n for n, m in inner.named_modules() if isinstance(m, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose3d))}
    main = [row for row in rows if row.main]
    assert convolutions <= {row.name for row in main}
    assert len(main) < len(rows)
    assert all(row.seconds >= 0 and row.calls >= 1 for row in rows)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner.modules()), "left as it was"
    for row in (main[0], main[len(main) // 2], main[-1]):
        torch.testing.assert_close(layer_output(network, row.name, 0), seen[row.name][0], rtol=0, atol=0)


def test_own_times_leave_out_the_modules_inside() -> None:
    """A container that does nothing takes nearly no time of its own, the module inside all of it."""

    class Sleeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.05)
            return x * 1

    image = torch.rand(1, 8, 8)
    net = nn.Sequential(nn.Sequential(Sleeps(), nn.Conv2d(1, 2, 1)), nn.ReLU())
    rows = {
        r.name: r
        for r in network_layers(
            WindowedNetwork(Model(net, image.device), image, plan_windows(SimpleInferer(), (8, 8))), 0
        )
    }
    assert rows["0.0"].seconds >= 0.05 > rows["0"].seconds
    assert (rows["0"].main, rows["0.1"].main, rows["0.1"].parameters) == (False, True, 4)


def test_a_layer_that_runs_twice_is_one_row() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    image = torch.rand(1, 8, 8)
    (row,) = network_layers(
        WindowedNetwork(Model(Twice(), image.device), image, plan_windows(SimpleInferer(), (8, 8))), 0
    )
    assert (row.name, row.calls) == ("layer", 2)


def test_the_window_of_a_voxel_and_its_cell() -> None:
    image = torch.rand(1, 20, 6)
    plan = plan_windows(SlidingWindowInferer((8, 8), overlap=0.5), (20, 6))
    network = WindowedNetwork(Model(nn.Conv2d(1, 2, 1), image.device), image, plan)
    for voxel in ((0, 0), (9, 3), (19, 5)):
        window = central_window(network, voxel)
        place = plan.place(window)
        assert all(p.start <= v < p.stop for v, p in zip(voxel, place))
        marked = torch.zeros(1, 20, 6)
        marked[(0, *voxel)] = 1
        pooled = nn.functional.max_pool2d(plan.cut(marked, window)[None], 2)[0, 0]
        assert pooled[cell_of(voxel, network, window, pooled.shape)] == 1, "also in a padded window"


def test_what_is_refused() -> None:
    network = windowed("classifier")
    with pytest.raises(UsageError, match="has no layer"):
        layer_output(network, "nowhere", 0)
    assert layer_output(network, "6", 0).shape == (2,)
    scripted = torch.jit.trace(classifier().eval(), torch.rand(1, 1, 16, 16))
    one = WindowedNetwork(
        Model(scripted, torch.device("cpu")), torch.rand(1, 16, 16), plan_windows(SimpleInferer(), (16, 16))
    )
    with pytest.raises(UsageError, match="TorchScript"):
        network_layers(one, 0)
    bare = WindowedNetwork(
        Model(nn.Conv2d(1, 2, 1), torch.device("cpu")), torch.rand(1, 8, 8), plan_windows(SimpleInferer(), (8, 8))
    )
    with pytest.raises(UsageError, match="without layers inside"):
        network_layers(bare, 0)
