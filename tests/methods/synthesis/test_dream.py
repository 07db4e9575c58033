"""DeepDream against the whole-volume computation, and inversion of layers that can be inverted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import DeepDream, InvertedRepresentation
from esegeta_monai.methods.synthesis.dream import _mask, correlation, resize
from esegeta_monai.targets import Box, ClassScore, LabelMask, MultiClassMask, Voxel
from tests.methods.synthesis.test_visualization import explained, layer_values
from tests.networks import CLASSIFICATION, build
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import assert_equal, noise


def energy_of(network: nn.Module, layer: str, channel: int | None, inferer, image: Tensor) -> Tensor:
    """The blended energy (or channel) of a layer, averaged over the volume, through MONAI's own inferer."""

    def predictor(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = network.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        network(x)
        handle.remove()
        read = kept[0].square().mean(1, keepdim=True) if channel is None else kept[0][:, channel : channel + 1]
        return F.interpolate(read, x.shape[2:], mode="nearest-exact")

    return inferer(image[None], predictor)[0].mean()


@pytest.mark.parametrize("channel", [None, 2])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("shape", [(1, 6, 20), (2, 12, 9), (1, 6, 9, 12)])
def test_the_gradient_of_a_layer_equals_that_of_the_whole_volume(shape, norm, channel):
    case = Naive(small(len(shape) - 1, shape[0], norm), noise(*shape))
    method = DeepDream("a", channel, octaves=1)
    with frozen(case.net):
        canvas = method._canvas(case.objective, 0, "a", case.image.shape[1:])
        value, gradient = canvas.climb(case.image)
    x = case.image.clone().requires_grad_(True)
    whole = energy_of(case.net, "a", channel, case.inferer, x)
    assert value == pytest.approx(float(whole), rel=1e-10)
    assert_equal(gradient, torch.autograd.grad(whole, x)[0])


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_one_step_for_a_target_is_the_normed_gradient_of_the_whole_volume(output):
    case = Naive(small(2, 2), noise(2, 6, 20), [MultiClassMask(1, output=output)])
    result = explained(DeepDream(octaves=1, n_iter=1, step=1e-3), case)
    x = case.image.clone().requires_grad_(True)
    score = case.scores[0]
    prediction = case.inferer(x[None], case.net)[0]
    value = score.value(score.crop(prediction)) / score.voxels
    (g,) = torch.autograd.grad(value, x)
    low, high = (getattr(case.image.flatten(1), end)(1)[:, None, None] for end in ("amin", "amax"))
    expected = case.image + 1e-3 * (high - low) * g / g[g != 0].square().mean().sqrt()
    assert_equal(result.maps[0], expected.clamp(low, high))
    assert result.note(0)["curve"] == [pytest.approx(float(value), rel=1e-10)]
    # the image's own prediction comes from MONAI's blending, that of a step from the canvas': sums in another order
    assert result.note(0)["objective_start"] == result.note(0)["objective_image"]
    assert result.note(0)["objective_start"] == pytest.approx(result.note(0)["curve"][0], rel=1e-14)


@pytest.mark.parametrize("shape", [(2, 12, 20), (1, 10, 9, 12)])
@pytest.mark.parametrize("layer", ["a", None])
def test_step_zero_is_the_image(shape, layer):
    case = Naive(small(len(shape) - 1, shape[0]), noise(*shape))
    result = explained(DeepDream(layer, n_iter=0), case)
    assert torch.equal(result.maps[0], case.image)
    assert result.note(0)["correlation_with_image"] == pytest.approx(1, abs=1e-12)
    assert result.note(0)["curve"] == []
    one = explained(DeepDream(layer, n_iter=1, octaves=1, jitter=0), case)
    assert one.note(0)["curve"] == [pytest.approx(one.note(0)["objective_image"], rel=1e-12)]


DREAMS = [("UNet_instance", 2), ("UNet_batch", 2), ("ViT", 2), ("UNet_batch", 3), ("UNet_instance", 3)]
DREAMS += [pytest.param("UNETR", 3, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "dims"), DREAMS)
def test_the_dream_rises_and_stays_like_the_image(name, dims):
    """By a tenth of its start; at one octave, at these windows of 16 voxels."""
    case = build(name, dims)
    target = ClassScore(1) if case.kind == CLASSIFICATION else MultiClassMask(1)
    image, inferer = case.image, SimpleInferer()
    if case.kind != CLASSIFICATION:
        half = case.roi[-1] // 2
        image = torch.cat([case.image, case.reference[..., :half]], -1)
        inferer = SlidingWindowInferer(case.roi, 2, 0.5, "gaussian")
    methods = [DeepDream(case.cam_layer, octaves=1, jitter=0), DeepDream(octaves=2, n_iter=5)]
    for result in Explainer(case.network, inferer, output=case.output)(image, methods, [target]):
        record, dream = result.record, result.map.as_tensor()
        assert record["objective_rise"] >= 0.1, record["objective_rise"]
        assert record["warnings"] == []
        assert 0.7 < record["correlation_with_image"] < 1
        pair = torch.stack([dream.flatten(), image[0].flatten()])
        assert record["correlation_with_image"] == pytest.approx(float(torch.corrcoef(pair)[0, 1]), rel=1e-9)
        assert bool((dream >= image.min()).all() & (dream <= image.max()).all())
    assert record["octave_shapes"][-1] == list(image.shape[2:])


def test_octaves():
    """Their sizes, their windows, and a mask that shrinks with the image but never away."""
    case = Naive(small(), noise(1, 20, 40), [Box(1, (4, 10), (16, 31)), Voxel(0, index=(3, 3))])
    method = DeepDream(octaves=4, octave_scale=1.5, n_iter=1)
    shapes = method._shapes(case.objective)
    assert shapes == [[9, 18], [13, 27], [20, 40]]  # 6 voxels would be less than SMALLEST
    objective = case.objective
    for k, score in enumerate(case.scores):
        whole = torch.zeros(20, 40, dtype=torch.bool)
        whole[score.box] = score.mask
        assert torch.equal(_mask(objective, k, objective.plan, (20, 40)), whole)
        for shape in shapes[:-1]:
            mask = _mask(objective, k, objective.plan.resized(shape), shape)
            assert tuple(mask.shape) == tuple(shape)
            assert int(mask.sum()) >= 1
            if k == 0:
                assert float(mask.double().mean()) == pytest.approx(float(whole.double().mean()), abs=0.04)
    result = explained(method, case)
    assert len(result.note(0)["curve"]) == 3
    assert case.objective.context.progress.passes <= method.passes(case.objective)
    layered = DeepDream("a", octaves=2, n_iter=2)
    again = Naive(small(), noise(1, 20, 40))
    explained(layered, again)
    assert again.objective.context.progress.passes == layered.passes(again.objective)


def test_a_network_that_sees_the_whole_image_sees_small_octaves_padded_to_its_own_size():
    sizes = []

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3, padding=1, dtype=torch.float64)
            self.linear = nn.Linear(4 * 18 * 15, 2, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            sizes.append(tuple(x.shape[2:]))
            return self.linear(F.silu(self.conv(x)).flatten(1))

    torch.manual_seed(0)
    case = Naive(Fixed(), noise(1, 18, 15), [ClassScore(1)], SimpleInferer())
    for layer in (None, "conv", "linear"):
        result = explained(DeepDream(layer, None if layer != "linear" else 1, n_iter=3, jitter=0), case)
        assert result.note(0)["octave_shapes"] == [[9, 8], [13, 11], [18, 15]]
        curve = result.note(0)["curve"]
        assert [curve[i + 2] > curve[i] for i in (0, 3, 6)] == [True] * 3  # it climbs at each size
    assert set(sizes) == {(18, 15)}
    small_plan = case.objective.plan.resized((9, 8))
    small_image = noise(1, 9, 8)
    padded = small_plan.cut(small_image, 0)
    assert padded.shape == (1, 18, 15)
    assert_equal(padded, F.pad(small_image[None], (3, 4, 4, 5), mode="replicate")[0])


def test_resize_keeps_means_and_corners():
    image = noise(2, 8, 6)
    assert resize(image, (8, 6)) is image
    assert_equal(resize(image, (4, 3)), image.reshape(2, 4, 2, 3, 2).mean((2, 4)))
    constant = torch.full((1, 4, 4, 4), 2.5, dtype=torch.float64)
    assert_equal(resize(constant, (6, 7, 5)), torch.full((1, 6, 7, 5), 2.5, dtype=torch.float64))


class Mixed(nn.Module):
    """A linear layer that can be inverted: channels mixed, then voxels with their neighbours; not a 1:1 copy."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.layer = conv(channels, channels, 3, padding=1, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.normal_(0, 0.3 / (channels * 3**dims) ** 0.5)
            middle = (slice(None), slice(None), *(1,) * dims)
            self.layer.weight[middle] += torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


@pytest.mark.parametrize("shape", [(2, 12, 9), (3, 6, 7, 5)])
def test_inversion_of_an_invertible_layer_is_the_image(shape):
    torch.manual_seed(0)
    case = Naive(Mixed(len(shape) - 1, shape[0]), noise(*shape), [MultiClassMask(1)], SimpleInferer())
    result = explained(InvertedRepresentation("layer", alpha_weight=0, tv_weight=0, n_iter=100), case)
    assert float((result.maps[0] - case.image).abs().max() / case.image.abs().max()) < 1e-6
    assert result.note(0)["distance_share"] < 1e-12
    assert result.note(0)["correlation_with_image"] == pytest.approx(1, abs=1e-9)


INVERTED = [("UNet_instance", 2), ("UNet_batch", 2), ("ViT", 2), ("UNet_batch", 3), ("UNet_instance", 3)]


@pytest.mark.parametrize(("name", "dims"), INVERTED)
def test_the_layers_distance_falls_below_a_tenth(name, dims):
    """And is what the plain network gives, at a deep layer of each architecture."""
    case = build(name, dims)
    target = ClassScore(1) if case.kind == CLASSIFICATION else MultiClassMask(1)
    method = InvertedRepresentation(case.cam_layer, n_iter=60)
    (result,) = Explainer(case.network, output=case.output)(case.image, [method], [target])
    actual, expected = (layer_values(case.network, case.cam_layer, x) for x in (result.map.as_tensor(), case.image[0]))
    distance = float((actual - expected).square().sum() / expected.square().sum())
    assert result.record["distance_end"] == pytest.approx(distance, rel=1e-9)
    assert result.record["distance_share"] < 0.1
    assert result.record["layer"] == case.cam_layer
    assert result.record["warnings"] == []


def test_the_window_that_is_inverted_is_one_that_the_target_sees():
    case = Naive(small(), noise(1, 8, 40), [Voxel(1, index=(1, 37))])
    result = explained(InvertedRepresentation("a", n_iter=60, alpha_weight=0, tv_weight=0), case)
    assert result.note(0)["place"] == [[0, 8], [28, 36]] or result.note(0)["place"] == [[0, 8], [32, 40]]
    place = result.note(0)["place"][1]
    assert bool((result.maps[0, 0, :, : place[0]] == result.note(0)["intensity_range"][0][0]).all())
    inside = slice(*place)
    assert correlation(result.maps[0, ..., inside], case.image[..., inside]) > 0.95  # 5 channels of one


def test_the_penalties_by_hand():
    method = InvertedRepresentation("a", alpha=4, alpha_weight=0.5, tv_weight=2.0, beta=1.0)
    r = torch.tensor([[[1.0, -2.0], [0.0, 3.0]]], dtype=torch.float64)
    slopes = [(9 + 1) ** 0.5, 5.0, 3.0, 1e-6]  # a step below, a step to the right; the last voxel has none
    expected = 0.5 * (1 + 16 + 0 + 81) / 4 + 2 * sum(slopes) / 4
    assert float(method._penalty(r)) == pytest.approx(expected, rel=1e-12)
    square = InvertedRepresentation("a", alpha_weight=0, tv_weight=2.0, beta=2.0)
    assert float(square._penalty(r)) == pytest.approx(2 * (10 + 25 + 9 + 0) / 4, rel=1e-9)


def test_penalties_smooth_and_shrink():
    def roughness(method: InvertedRepresentation) -> tuple[float, float]:
        case = Naive(small(), noise(1, 12, 12), inferer=SimpleInferer())
        image = explained(method, case).maps[0]
        return float(image.diff(dim=1).square().mean() + image.diff(dim=2).square().mean()), float(image.std())

    plain = roughness(InvertedRepresentation("a", alpha_weight=0, tv_weight=0, n_iter=30))
    smooth = roughness(InvertedRepresentation("a", alpha_weight=0, tv_weight=1.0, n_iter=30))
    flat = roughness(InvertedRepresentation("a", alpha=2, alpha_weight=10.0, tv_weight=0, n_iter=30))
    assert smooth[0] < 0.5 * plain[0]
    assert flat[1] < 0.5 * plain[1]


def test_a_warning_where_too_much_is_left():
    case = Naive(small(), noise(1, 12, 12), inferer=SimpleInferer())
    result = explained(InvertedRepresentation("a", n_iter=1, max_share=1e-3), case)
    assert result.note(0)["distance_share"] > 1e-3
    assert any("a share of 0.001 is required" in w for w in case.objective.context.progress.warnings)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: DeepDream(channel=1), "give layer"),
        (lambda: DeepDream(octaves=0), "octaves"),
        (lambda: DeepDream(octave_scale=1.0), "octave_scale"),
        (lambda: DeepDream(n_iter=-1), "n_iter"),
        (lambda: DeepDream(step=0), "step"),
        (lambda: InvertedRepresentation(alpha_weight=-1), "alpha_weight"),
        (lambda: InvertedRepresentation(beta=0), "beta"),
        (lambda: InvertedRepresentation(n_iter=0), "n_iter"),
    ],
)
def test_what_is_refused_at_once(make, text):
    with pytest.raises(UsageError, match=text):
        make()


def test_a_silent_layer_cannot_be_inverted():
    network = nn.Sequential(nn.Conv2d(1, 2, 1, dtype=torch.float64), nn.ReLU())
    with torch.no_grad():
        network[0].bias.fill_(-99)
    case = Naive(network, noise(1, 8, 8), [MultiClassMask(0)], SimpleInferer())
    with pytest.raises(MethodError, match="choose another"):
        explained(InvertedRepresentation("1"), case)
    result = explained(DeepDream("1"), case)
    assert torch.equal(result.maps[0], case.image)
    assert any("gradient is zero" in w for w in case.objective.context.progress.warnings)


def test_inversion_looks_for_a_layer_only_where_there_is_a_target():
    explainer = Explainer(small(2, 1), SlidingWindowInferer((8, 8), 2), on_error="record")
    nowhere = [LabelMask(torch.zeros(12, 12), 1, class_index=1)]
    methods = [InvertedRepresentation(n_iter=2), InvertedRepresentation("a", n_iter=2, max_share=2.0)]
    result = list(explainer(noise(1, 1, 12, 12), methods, nowhere))
    assert {f.method.layer: f.status for f in result} == {None: "empty_target", "a": "ok"}


def test_a_dream_of_no_steps_is_the_image_with_a_note():
    (result,) = Explainer(small(2, 1))(noise(1, 1, 12, 12), [DeepDream(n_iter=0)], [Box(1, (0, 0), (4, 4))])
    assert torch.equal(torch.as_tensor(result.map), noise(1, 12, 12))
    assert "take more steps" in result.record["warnings"][0]


def test_the_distance_is_the_layers_own_where_its_grid_does_not_divide_the_windows():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)).double().eval()
    image = noise(1, 1, 9, 11)
    methods = [InvertedRepresentation("0", n_iter=n, max_share=2.0) for n in (3, 6)]
    for result in Explainer(net)(image, methods, [Box(1, (0, 0), (2, 2))]):
        with torch.no_grad():
            actual, case = net[0](torch.as_tensor(result.map)[None].double()), net[0](image)
        expected = float((actual - case).square().sum() / case.square().sum())
        assert result.record["distance_end"] == pytest.approx(expected, rel=1e-5)
