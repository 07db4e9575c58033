"""Windows whose output counts in a box of their own: the maps are those of the plain loop that assembles the boxes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import EsegetaError, NetworkError
from esegeta_monai.explain import EnsembleInferer


class Parts:
    """The volume in two parts along its first axis, which overlap; each is predicted by windows of its own.

    Args:
        length: length of the first axis.
        roi: shape of a window.
    """

    def __init__(self, length: int, roi: tuple[int, ...]) -> None:
        self.length, self.roi = length, roi
        self.read = ((0, length // 2 + 3), (length // 2 - 2, length))
        self.kept = ((0, length // 2), (length // 2, length))

    def starts(self, shape: tuple[int, ...]) -> Any:
        """Return, for each part, the first voxels of its windows."""
        for (low, high), kept in zip(self.read, self.kept):
            axes = []
            for axis, (n, r) in enumerate(zip(shape, self.roi)):
                first, last = (low, high) if axis == 0 else (0, n)
                axes.append(sorted({*range(first, last - r, 3), last - r}))
            yield kept, list(itertools.product(*axes))

    def importance(self, dtype: torch.dtype) -> Tensor:
        """Return weights without symmetry."""
        return torch.arange(1, 1 + torch.Size(self.roi).numel(), dtype=dtype).reshape(self.roi)

    def declared_windows(self, spatial_shape: Any, dtype: torch.dtype) -> WindowPlan:
        shape, slices, owned = tuple(spatial_shape), [], []
        for kept, starts in self.starts(shape):
            slices += [tuple(slice(a, a + r) for a, r in zip(start, self.roi)) for start in starts]
            owned += [(slice(*kept), *(slice(0, n) for n in shape[1:]))] * len(starts)
        pads = ((0, 0),) * len(shape)
        return WindowPlan(
            shape, self.roi, tuple(slices), pads, importance=self.importance(dtype), batch_size=2, owned=tuple(owned)
        )

    def __call__(self, inputs: Tensor, network: Any) -> Tensor:
        """Predict each part by itself, and put the predictions together."""
        done, shape = [], tuple(inputs.shape[2:])
        weight = self.importance(inputs.dtype)
        for (low, high), starts in self.starts(shape):
            total: Any = 0
            count = torch.zeros(shape, dtype=inputs.dtype)
            for start in starts:
                place = tuple(slice(a, a + r) for a, r in zip(start, self.roi))
                out = network(inputs[(..., *place)])
                whole = torch.zeros(*out.shape[:2], *shape, dtype=out.dtype)
                whole[(..., *place)] = out * weight
                total, count = total + whole, count.index_put_(_grid(place), weight, accumulate=True)
            done.append((total / count)[:, :, low:high])
        return torch.cat(done, 2)


def _grid(place: tuple[slice, ...]) -> tuple[Tensor, ...]:
    return torch.meshgrid(*(torch.arange(s.start, s.stop) for s in place), indexing="ij")


def networks(dims: int) -> list[nn.Module]:
    torch.manual_seed(0)
    conv: Any = nn.Conv2d if dims == 2 else nn.Conv3d
    return [
        nn.Sequential(conv(2, 4, 3, padding=1), nn.SiLU(), conv(4, 3, 3, padding=1)).double().eval() for _ in range(2)
    ]


CASES: dict[str, Any] = {
    "2D": ((15, 9), (6, 5), {}),
    "3D, mirrored windows": ((14, 7, 6), (6, 5, 4), {"mirror_axes": (0,)}),
    "2D, mirrored volume": ((15, 9), (6, 5), {"mirror_axes": (0, 1), "around": True}),
}


@pytest.mark.parametrize(("shape", "roi", "views"), CASES.values(), ids=CASES)
def test_maps_are_those_of_the_plain_loop(shape: tuple[int, ...], roi: tuple[int, ...], views: dict[str, Any]) -> None:
    """Gradient by autograd, occlusion by brute force, and layer maps by their own check, over members and views."""
    members = networks(len(shape))
    image = torch.rand(1, 2, *shape, dtype=torch.float64)
    parts = Parts(shape[0], roi)

    def predict(x: Tensor) -> Tensor:
        axes = views.get("mirror_axes", ())
        flips = [[a + 2 for a in c] for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
        total: Any = 0
        for member in members:
            if views.get("around"):
                outs = [parts(x.flip(f), member).flip(f) for f in flips]
            else:
                outs = [parts(x, lambda w, f=f, m=member: m(w.flip(f)).flip(f)) for f in flips]
            total = total + sum(outs) / len(flips) / len(members)
        return total

    inferer = EnsembleInferer(parts, members, **views)
    layers = ["LayerActivation", "GradCam", "LayerGradientXActivation"]
    methods = ["VanillaBackprop", "Occlusion(window=3, baseline=0.0)", *layers]
    done = list(Explainer(members[0], inferer, checks="maps")(image, methods, ["MultiClassMask(1)"]))
    of = {attribution.record["method"]: attribution for attribution in done}  # shared passes change the order
    vanilla, occlusion = of["VanillaBackprop"], of["Occlusion"]
    x = image.clone().requires_grad_(True)
    prediction = predict(x)
    mask = prediction[0].argmax(0) == 1
    assert vanilla.record["target_voxels"] == int(mask.sum()) > 0
    score = prediction[0, 1][mask].sum()
    (expected,) = torch.autograd.grad(score, x)
    assert float((vanilla.map.as_tensor() - expected[0]).abs().max() / expected.abs().max()) <= 1e-10
    middle = shape[0] // 2  # a voxel that both parts read
    changed = image.clone()
    first = [3 * (middle // 3), 0, 0][: len(shape)]
    changed[(..., *(slice(a, a + 3) for a in first))] = 0
    effect = float((score - predict(changed)[0, 1][mask].sum()).detach())
    assert float(occlusion.map[(0, *first)]) == pytest.approx(effect, rel=0, abs=1e-10 * abs(float(score.detach())))
    for name in layers:
        assert of[name].record["map_check"] in ("passed", "not checked"), of[name].record["checks"]
    assert of["LayerActivation"].record["map_check"] == "passed"


def test_a_window_counts_only_where_it_is_read() -> None:
    """Windows outside the mask are not run, and the weights sum to one."""
    plan = Parts(14, (6, 5, 4)).declared_windows((14, 7, 6), torch.float64)
    grid = OutputGrid(plan, plan.roi, torch.float64)
    total = torch.zeros(plan.spatial_shape, dtype=torch.float64)
    for w in range(len(plan)):
        grid.blend(total, tuple(slice(0, n) for n in plan.spatial_shape), w, torch.ones(plan.roi, dtype=torch.float64))
    torch.testing.assert_close(total, torch.ones_like(total))
    box = (slice(7, 8), slice(0, 7), slice(0, 6))  # owned by the second part, read by windows of both
    windows = grid.windows_of(box)
    assert windows
    assert all(plan.owned[w][0] == slice(7, 14) for w in windows)
    assert len(windows) < len(plan.touched(box))
    assert plan.coverage == 1


def test_boxes_that_do_not_fit_are_refused() -> None:
    image, (network, _) = torch.rand(1, 2, 15, 9, dtype=torch.float64), networks(2)

    class Wrong(Parts):
        def declared_windows(self, spatial_shape: Any, dtype: torch.dtype) -> WindowPlan:
            plan = super().declared_windows(spatial_shape, dtype)
            return replace(plan, owned=change(plan.owned))

    change: Any = lambda owned: owned[1:]  # noqa: E731
    with pytest.raises(NetworkError, match="owned has"):
        list(Explainer(network, Wrong(15, (6, 5)))(image, ["Saliency"], ["MultiClassMask(1)"]))
    change = lambda owned: tuple((slice(0, 7), *box[1:]) for box in owned)  # noqa: E731
    with pytest.raises(NetworkError, match="cover 47 %"):
        list(Explainer(network, Wrong(15, (6, 5)))(image, ["Saliency"], ["MultiClassMask(1)"]))
    plan = Parts(14, (6, 4)).declared_windows((14, 8), torch.float64)
    with pytest.raises(NetworkError, match="whole output"):
        OutputGrid(plan, (3, 2), torch.float64)  # the boxes begin at 7
    with pytest.raises(EsegetaError, match="count in"):
        plan.resized((14, 8))
