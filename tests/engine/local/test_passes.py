"""Scores from passes in parts equal those from plain passes; they are checked, bounded and recorded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import DenseNet121, SegResNet, UNet, resnet18
from torch import nn

from esegeta_monai.engine.local import passes, spatial
from esegeta_monai.engine.local.passes import LocalPasses
from esegeta_monai.engine.local.reach import Ranges
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.targets import Box, Case, ClassScore
from tests.engine.local.support import positions, randomise


@pytest.fixture(autouse=True)
def small_windows_count(monkeypatch):
    """The windows of these tests are so small that calling an operation takes longer than the operation."""
    monkeypatch.setattr(passes, "PLAIN_STEP", 0.0)
    monkeypatch.setattr(passes, "PART_STEP", 0.0)


class Counted(nn.Module):
    """Counts the windows that it sees."""

    def __init__(self, network):
        super().__init__()
        self.network, self.windows = network, 0

    def forward(self, x):
        self.windows += len(x)
        return self.network(x)


def mesh(dims=3):
    conv = nn.Conv3d if dims == 3 else nn.Conv2d
    layers, channels = [], 1
    for dilation in (1, 2, 4, 2, 1):
        layers += [conv(channels, 4, 3, padding=dilation, dilation=dilation), nn.ReLU(inplace=True)]
        channels = 4
    return nn.Sequential(*layers, conv(channels, 2, 1))


def unet(*channels, dims=3, norm="batch"):
    return UNet(dims, 1, 2, channels, (2,) * (len(channels) - 1), num_res_units=2, norm=norm)


def case(network, shape, targets, roi=None, dtype=torch.float64, **options):
    """An objective; without a roi, of one window."""
    torch.manual_seed(0)
    network = randomise(network).to(dtype)
    image = torch.randn(1, *shape, dtype=dtype)
    inferer = None if roi is None else SlidingWindowInferer(roi, 2, 0.5, "gaussian", **options)
    with torch.no_grad():
        prediction = (network if inferer is None else lambda x: inferer(x, network))(image[None])[0]
    scores = [score for target in targets for score in target.bind(prediction, Case())]
    counted = Counted(network)
    plan = plan_windows(inferer, shape)
    return Objective(Model(counted, torch.device("cpu")), image, plan, scores, prediction)


def boxes_of(shape, size, step):
    ours = list(positions(shape, size, step))
    return Boxes([[a for a, _ in box] for box in ours], [[b for _, b in box] for box in ours], 0.3)


def both(o, perturbations):
    """Scores in parts and plain, the note of the former, and what warnings it left."""
    plain = o.derive()
    plain.context.local = False
    with frozen(o.model.network):
        right = score_changes(plain, perturbations)
        o.context.local = True
        ours = score_changes(o.derive(), perturbations)
    return ours, right, o.context.local_note, list(o.context.progress.warnings)


def equal(ours, right, o, bound):
    return bool((ours - right).abs().max() <= bound * o.image_values().abs().max())


LESION = ((5, 5, 5), (9, 8, 9))
NETWORKS = {
    "UNet, 3 levels": (lambda: unet(4, 8, 16), (16,) * 3, Box(1, *LESION), 4, 4),
    "UNet, 5 levels": (lambda: unet(2, 4, 4, 8, 8), (32,) * 3, Box(1, *LESION), 8, 16),
    "MeshNet": (mesh, (24,) * 3, Box(1, *LESION), 6, 9),
    "ResNet18": (lambda: resnet18(spatial_dims=3, n_input_channels=1, num_classes=2), (48,) * 3, ClassScore(1), 8, 20),
    "DenseNet121": (lambda: DenseNet121(2, 1, 2), (128, 128), ClassScore(1), 16, 40),
}


@pytest.mark.parametrize(
    "name", [n if "Net" in n and n[0] in "UM" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_scores_equal_plain_passes(name, dtype, bound):
    make, shape, target, size, step = NETWORKS[name]
    o = case(make(), shape, [target], dtype=dtype)
    ours, right, note, warnings = both(o, boxes_of(shape, size, step))
    assert right.abs().max() > 0
    assert equal(ours, right, o, bound)
    assert warnings == []
    assert note["passes_in_parts"] > 0
    assert note["share_of_work"] < 0.67


@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_windows_overlap_and_volumes_are_padded(output, padding):
    targets = [Box(1, (3, 5), (6, 9), output=output), Box(0, (14, 14), (17, 16), output=output)]
    o = case(mesh(2), (40, 20), targets, roi=(24, 24), padding_mode=padding)
    ours, right, note, warnings = both(o, boxes_of((40, 20), 3, 3))
    assert equal(ours, right, o, 1e-10)
    assert warnings == []
    assert note["passes_in_parts"] > 0


def test_one_window_is_kept_at_a_time(monkeypatch):
    o = case(mesh(2), (60, 24), [Box(1, (0, 0), (60, 24))], roi=(24, 24))
    kept = []
    keep = LocalPasses._keep_activations

    def watched(self, window):
        keep(self, window)
        kept.append((window, self._window, sum(t.nbytes for t in self._cache.values())))

    monkeypatch.setattr(LocalPasses, "_keep_activations", watched)
    _, _, note, _ = both(o, boxes_of((60, 24), 2, 5))
    assert [w for w, *_ in kept] == sorted({w for w, *_ in kept})
    assert all(w == now for w, now, _ in kept)
    assert {n for *_, n in kept} == {note["cache_bytes"]}


@pytest.mark.parametrize("make", [lambda: unet(4, 8, 16, dims=2, norm="instance"), lambda: SegResNet(2, 8, 1, 2)])
def test_norms_over_space_cost_one_pass_a_case(make):
    o = case(make(), (16, 16), [Box(1, (5, 5), (9, 8))])
    perturbations = boxes_of((16, 16), 3, 3)
    counted = o.model.network
    with frozen(counted):
        ours = score_changes(o, perturbations)
    assert counted.windows == len(perturbations) + 1 + 1  # the recorded pass, once a case
    note = o.context.local_note
    assert note["passes_in_parts"] == 0
    assert note["whole_operations"]
    assert "% of the work" in note["reason"]
    o.context.local = False
    with frozen(counted):
        assert torch.equal(ours, score_changes(o.derive(), perturbations))


def test_switched_off():
    o = case(mesh(2), (24, 24), [Box(1, (5, 5), (9, 8))])
    o.context.local = False
    with frozen(o.model.network):
        score_changes(o, boxes_of((24, 24), 3, 8))
    assert o.context.local_note == {
        "passes_in_parts": 0,
        "plain_passes": 10,
        "reason": "switched off (local=False)",
    }


def test_too_much_memory(monkeypatch):
    monkeypatch.setattr(passes, "CACHE_BYTES", 10_000)
    o = case(mesh(2), (24, 24), [Box(1, (5, 5), (9, 8))])
    ours, right, note, _ = both(o, boxes_of((24, 24), 3, 8))
    assert torch.equal(ours, right)
    assert note["passes_in_parts"] == 0
    assert "GiB" in note["reason"]


def test_corner_border_middle_and_largest_effects_are_checked(monkeypatch):
    o = case(mesh(2), (24, 24), [Box(1, (11, 11), (13, 13))])
    checked = []
    check = LocalPasses._check

    def watched(self, x, window, out):
        differs = (x != o.image[None]).any(1)[0].nonzero()
        checked.append((differs.min(0).values.tolist(), differs.max(0).values.tolist()))
        check(self, x, window, out)

    monkeypatch.setattr(LocalPasses, "_check", watched)
    perturbations = boxes_of((24, 24), 3, 3)
    ours, *_ = both(o, perturbations)
    borders = [sum(a == 0 or b == 23 for a, b in zip(lo, hi)) for lo, hi in checked]
    assert {0, 1, 2} <= set(borders)
    largest = perturbations.boxes[int(ours[0].abs().argmax())]
    assert [side.start for side in largest] in [lo for lo, _ in checked]
    assert len(checked) < 12


def naive(call):
    """Interpolate a part as if it were the whole: what a careless implementation does with align_corners."""
    local = right_interpolate(call)
    op = call.operation

    def compute(parts, box, boxes):
        size = [stop - start for start, stop in box[2:]]
        return F.interpolate(parts[0], size=size, mode=op.argument("mode"), align_corners=op.argument("align_corners"))

    return type(local)(local.reaches, compute, local.cost)


right_interpolate = spatial.interpolate


class Shifted(Ranges):
    """Boxes that lie one voxel beside the right ones."""

    def touches(self, start, stop):
        ours = super().touches(start, stop)
        return None if ours is None else (ours[0] + 1, ours[1] + 1)


def with_corners():
    up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1), up, nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("fault", ["corners", "shift"])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_a_careless_implementation_is_found_and_replaced(fault, output, monkeypatch):
    from esegeta_monai.engine.local import table

    if fault == "corners":
        monkeypatch.setitem(table._ROWS, "interpolate", naive)
    else:
        monkeypatch.setattr(spatial, "Ranges", Shifted)
    o = case(with_corners(), (24, 24), [Box(1, (4, 4), (20, 20), output=output)])
    ours, right, note, warnings = both(o, boxes_of((24, 24), 4, 4))
    assert torch.equal(ours, right)
    assert any("differ from plain passes" in text for text in warnings)
    assert "a check failed" in note["reason"]


def test_a_failed_check_is_remembered(monkeypatch):
    monkeypatch.setattr(spatial, "Ranges", Shifted)
    o = case(with_corners(), (24, 24), [Box(1, (4, 4), (20, 20))])
    with frozen(o.model.network):
        score_changes(o, boxes_of((24, 24), 4, 4))
        o.model.network.windows = 0
        score_changes(o, boxes_of((24, 24), 4, 4))
    assert o.model.network.windows == 36  # the unperturbed window is known
    assert "a check failed" in o.context.local_note["reason"]


def test_the_right_one_passes_the_same_check():
    o = case(with_corners(), (24, 24), [Box(1, (4, 4), (20, 20))])
    ours, right, note, warnings = both(o, boxes_of((24, 24), 4, 4))
    assert equal(ours, right, o, 1e-10)
    assert warnings == []
    assert note["passes_in_parts"] > 0
