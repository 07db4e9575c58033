"""Images synthesised from noise: known optima of linear networks, and objectives that rise on real architectures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import METHODS, ClassImage, DeepDream, FeatureVisualization, InvertedRepresentation, run
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.synthesis.canvas import intensity_range
from esegeta_monai.methods.synthesis.visualization import descend
from esegeta_monai.targets import ClassScore, LayerNeuron, MultiClassMask, Voxel
from tests.networks import CLASSIFICATION, build
from tests.support.networks import Computed, small
from tests.support.objectives import Naive
from tests.support.tensors import assert_equal, noise

STILL = {"jitter": 0, "scale": (1, 1), "rotate": 0}


class Linear(nn.Module):
    """Class 1 scores ``⟨w, x⟩ + 3``."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(noise(*shape, seed=1))

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).flatten(1).sum(1) + 3
        return torch.stack([torch.zeros_like(score), score], 1)


def linear(*shape: int) -> tuple[Naive, Tensor, Tensor]:
    """The case, w, and half of each channel's range, as (C, 1, …)."""
    net = Linear(*shape)
    image = noise(*shape) * torch.arange(1.0, 1 + shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    case = Naive(net, image, [ClassScore(1)], SimpleInferer())
    low, high = (intensity_range(image, None)[:, i].reshape(-1, *(1,) * (len(shape) - 1)) for i in (0, 1))
    return case, net.w.detach(), (high - low) / 2


def explained(method: Method, case: Naive) -> Explained:
    with frozen(case.net):
        return run(method, case.objective)


SHAPES = [(2, 9, 7), (3, 5, 4, 6)]


@pytest.mark.parametrize("shape", SHAPES)
def test_phases_of_a_linear_network_become_those_of_its_weights(shape):
    """MaCo: of all images with the magnitudes of the case, the one with the phases of w has the largest ⟨w, x⟩."""
    case, w, _ = linear(*shape)
    image, axes = case.image, tuple(range(1, len(shape)))
    method = FeatureVisualization(parametrisation="phase", n_iter=300, lr=0.1, **STILL)
    result = explained(method, case)
    data, weights = (torch.fft.fftn(t, dim=axes) for t in (image, w))
    own = torch.tensor([[all(2 * i % n == 0 for i, n in zip(at, shape[1:]))] for at in np.ndindex(*shape[1:])])
    own = own.reshape(shape[1:])
    terms = torch.where(own, data.real * weights.real, data.abs() * weights.abs())
    best = float(terms.sum() / data[0].numel()) + 3
    note = result.notes
    assert note["objective_end"] == pytest.approx([best], rel=1e-4)
    spectrum = torch.fft.fftn(result.maps[0], dim=axes)
    assert float((spectrum.abs() - data.abs()).abs().max()) <= 1e-10 * float(data.abs().max())
    low, high = intensity_range(image, None).reshape(-1, 2, *(1,) * len(axes)).unbind(1)
    outside = ((result.maps[0] < low) | (result.maps[0] > high)).double().mean()
    assert note["outside_intensity"] == pytest.approx([float(outside)])


@pytest.mark.parametrize("shape", SHAPES)
def test_class_image_of_a_linear_network_with_a_penalty_is_its_closed_form(shape):
    case, w, half = linear(*shape)
    result = explained(ClassImage(regularization=4.0, baseline="zero", n_iter=40), case)
    assert_equal(result.maps[0], half.square() * w * w.numel() / (2 * 4.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_class_image_of_a_linear_network_at_a_norm_has_the_direction_of_the_weights(shape):
    case, w, half = linear(*shape)
    result = explained(ClassImage(rms=0.3, baseline="mean", n_iter=60), case)
    origin = case.image.flatten(1).mean(1).reshape(-1, *(1,) * (len(shape) - 1))
    direction = half * w
    expected = 0.3 * direction / direction.square().mean().sqrt()
    actual = (result.maps[0] - origin) / half
    assert float(actual.square().mean().sqrt()) == pytest.approx(0.3, rel=1e-12)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-6  # where the line search stops
    assert result.note(0)["objective_rise"] > 1


@pytest.mark.parametrize("parametrisation", ["fourier", "voxel"])
@pytest.mark.parametrize("shape", SHAPES)
def test_feature_visualization_of_a_linear_network_comes_near_its_maximum(shape, parametrisation):
    """Within [low, high] a linear score is greatest where every voxel is at the end given by its weight's sign."""
    case, w, _ = linear(*shape)
    result = explained(FeatureVisualization(parametrisation=parametrisation, n_iter=200, lr=0.2, **STILL), case)
    low, high = (case.image.new_tensor(result.note(0)["intensity_range"])[:, i] for i in (0, 1))
    low, high = (v.reshape(-1, *(1,) * (len(shape) - 1)) for v in (low, high))
    best = 3 + float(torch.maximum(w * low, w * high).sum())
    reached = result.note(0)["objective_end"]
    assert 0.95 * best < reached <= best
    assert bool((result.maps[0] >= low).all() & (result.maps[0] <= high).all())
    assert reached == pytest.approx(3 + float((w * result.maps[0]).sum()), rel=1e-12)
    clear = w.abs() > 0.5
    assert float(((result.maps[0] > (low + high) / 2) == (w > 0))[clear].double().mean()) > 0.97


def layer_values(network: nn.Module, layer: str, image: Tensor) -> Tensor:
    """A layer's output at an image, by a hook; tokens as (n, C, T), the class token dropped."""
    kept: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(
        lambda m, i, o: kept.append((o[0] if isinstance(o, tuple) else o).clone())
    )
    with torch.no_grad():
        network(image[None])
    handle.remove()
    if kept[0].ndim > 3:
        return kept[0]
    tokens = kept[0].shape[1]
    return kept[0][:, tokens % 2 :].movedim(-1, 1)


RISING = [("UNet_instance", 2), ("UNet_batch", 2), ("ViT", 2), ("ResNet18", 2), ("UNet_instance", 3), ("UNet_batch", 3)]
RISING += [pytest.param("ViT", 3, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("name", "dims"), RISING)
def test_the_objective_rises_for_class_layer_and_channel(name, dims):
    """By at least a quarter of its start, and the record has what the plain network gives for the image."""
    case = build(name, dims)
    target = ClassScore(1) if case.kind == CLASSIFICATION else MultiClassMask(1)
    explainer = Explainer(case.network, output=case.output)
    still = {"n_iter": 48, "lr": 0.1, "jitter": 1, "intensity": (-1, 3)}
    layer = case.cam_layer
    channel = int(layer_values(case.network, layer, case.image[0]).flatten(2).mean((0, 2)).argmax())
    methods = [
        FeatureVisualization(**still, name="class"),
        FeatureVisualization(layer, **still, name="layer"),
        FeatureVisualization(layer, channel, **still, name="channel"),
        ClassImage(n_iter=24, name="image"),
    ]
    for result in explainer(case.image, methods, [target]):
        record, image = result.record, result.map.as_tensor()
        values = layer_values(case.network, layer, image)
        with torch.no_grad():
            score = float(case.score(image[None]))
        expected = {"layer": float(values.square().mean()), "channel": float(values[:, channel].mean())}
        assert record["objective_end"] == pytest.approx(expected.get(result.method.name, score), rel=1e-9)
        assert record["objective_rise"] >= 0.25, result.method.name
        assert record["status"] == "ok"
        assert record["warnings"] == []
        assert record["produces"] == "synthesised image"
        assert len(record["curve"]) >= 24


UNITS = [("UNet_instance", 2, "model.0"), ("UNet_instance", 3, "model.0"), ("SegResNet", 2, None)]
UNITS += [(name, dims, None) for name in ("UNet_batch", "ResNet18") for dims in (2, 3)]


@pytest.mark.parametrize(("name", "dims", "layer"), UNITS)
def test_a_unit_of_a_layer_is_excited_at_its_place(name, dims, layer):
    """Use the channel that is strongest on average: after a ReLU, others may be zero at the start."""
    case = build(name, dims)
    layer = layer or case.cam_layer
    target = ClassScore(1) if case.kind == CLASSIFICATION else MultiClassMask(1)
    channel = int(layer_values(case.network, layer, case.image[0]).flatten(2).mean((0, 2)).argmax())
    method = FeatureVisualization(layer, channel, "centre", n_iter=40, lr=0.1, jitter=1)
    (result,) = Explainer(case.network, output=case.output)(case.image, [method], [target])
    values = layer_values(case.network, layer, result.map.as_tensor())
    at = tuple(n // 2 * v // n for n, v in zip(case.image.shape[2:], values.shape[2:]))
    assert result.record["objective_end"] == pytest.approx(float(values[(0, channel, *at)]), rel=1e-9)
    assert result.record["objective_rise"] > 1
    assert float(values[0, channel].mean()) < float(values[(0, channel, *at)])


def test_a_target_of_one_voxel_stays_at_its_voxel():
    """`LayerNeuron` names the same unit as ``neuron``, and `Voxel` a logit at one place of its window."""
    case = build("UNet_batch", 2)
    options = {"n_iter": 12, "jitter": 1}
    at = tuple(n // 2 for n in case.roi)
    explainer = Explainer(case.network)
    (unit,) = explainer(case.image, [FeatureVisualization("model.0", 3, at, **options)], [MultiClassMask(1)])
    (target,) = explainer(case.image, [FeatureVisualization(**options)], [LayerNeuron("model.0", 3, index=at)])
    assert_equal(unit.map.as_tensor(), target.map.as_tensor())
    wide = torch.cat([case.image, case.reference], -1)
    inferer = SlidingWindowInferer(case.roi, 2, 0.5)
    index = (at[0], case.roi[1] + 3)
    (result,) = Explainer(case.network, inferer)(wide, [FeatureVisualization(**options)], [Voxel(1, index=index)])
    place = tuple(slice(*p) for p in result.record["place"])
    assert all(p.start <= i < p.stop for p, i in zip(place, index))
    with torch.no_grad():
        logits = case.logits(result.map.as_tensor()[(slice(None), *place)][None])
    there = tuple(i - p.start for i, p in zip(index, place))
    assert result.record["objective_end"] == pytest.approx(float(logits[(0, 1, *there)]), rel=1e-9)


def test_a_synthesised_image_fills_one_window_on_black():
    case = Naive(small(2, 2), noise(2, 6, 30))  # padded along the first axis, several windows along the last
    result = explained(FeatureVisualization(n_iter=5), case)
    place, intensity = result.note(0)["place"], result.note(0)["intensity_range"]
    assert place == [[0, 6], [12, 20]]
    outside = torch.ones(6, 30, dtype=torch.bool)
    outside[:, 12:20] = False
    for channel, (low, high) in zip(result.maps[0], intensity):
        assert channel[outside].unique().tolist() == [low]
        assert low < float(channel[:, 12:20].min()) < float(channel.max()) < high
        assert (low, high) == pytest.approx(
            tuple(np.percentile(case.image[intensity.index([low, high])], (0.5, 99.5))), rel=1e-12
        )
    whole = explained(FeatureVisualization(n_iter=5, extent="image"), case)
    assert whole.note(0)["place"] == [[0, 6], [0, 30]]


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("extent", ["window", "image"])
def test_passes_and_values_of_several_targets(output, extent):
    case = Naive(small(2, 1), noise(1, 6, 20), [MultiClassMask(1, output=output), MultiClassMask(0, output=output)])
    method = FeatureVisualization(n_iter=4, extent=extent)
    result = explained(method, case)
    assert case.objective.context.progress.passes == method.passes(case.objective)
    assert not torch.equal(result.maps[0], result.maps[1])
    assert result.note(0)["place"] != result.note(0)["curve"]
    if extent == "image":  # F is that of MONAI's own inferer
        prediction = case.predict(result.maps[1])
        raw = prediction.softmax(0) if output == "probability" else prediction
        assert result.note(1)["objective_end"] == pytest.approx(float(raw[0].mean()), rel=1e-10)


def test_for_a_layer_the_targets_share_one_image():
    case = Naive(small(), noise(1, 8, 12), [MultiClassMask(1), MultiClassMask(0)])
    method = FeatureVisualization("a", 2, n_iter=3)
    result = explained(method, case)
    assert torch.equal(result.maps[0], result.maps[1])
    assert case.objective.context.progress.passes == method.passes(case.objective) == 3 + 4
    assert result.note(1)["layer"] == "a"


def test_the_same_seed_gives_the_same_image_and_another_one_another():
    def once(seed: int) -> Tensor:
        return explained(FeatureVisualization(n_iter=4), Naive(small(), noise(1, 8, 8), seed=seed)).maps

    assert torch.equal(once(0), once(0))
    assert not torch.equal(once(0), once(1))


def test_a_class_that_the_case_does_not_have_can_be_synthesised():
    image = torch.rand(1, 1, 8, 8)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Softmax(1))
    with torch.no_grad():
        network[0].bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    methods = [FeatureVisualization(n_iter=3), ClassImage(n_iter=3), InvertedRepresentation("0", n_iter=3)]
    methods += [DeepDream("0", n_iter=1, octaves=1), DeepDream(n_iter=1, octaves=1, name="of target")]
    result = Explainer(network)(image, methods, [MultiClassMask(2)])
    assert sorted((a.method.name, a.status) for a in result) == [
        ("ClassImage", "ok"),
        ("DeepDream", "ok"),
        ("FeatureVisualization", "ok"),
        ("InvertedRepresentation", "ok"),
        ("of target", "empty_target"),
    ]


def test_without_a_case_the_grid_is_one_of_unit_voxels():
    network = small().float()
    method = FeatureVisualization(n_iter=3, intensity=(0, 2))
    (result,) = Explainer(network)(torch.rand(1, 1, 8, 8), [method], [MultiClassMask(1)])
    assert result.record["intensity_range"] == [[0, 2]]
    assert isinstance(result.map, MetaTensor)
    assert np.array_equal(result.record["network_affine"], np.eye(len(result.record["network_affine"])))
    with pytest.raises(MethodError, match="constant"):
        intensity_range(torch.stack([torch.rand(8, 8), torch.ones(8, 8)]), None)


def test_a_warning_where_the_objective_does_not_rise():
    def flat(x: Tensor) -> Tensor:
        return torch.cat([5 + 1e-3 * x, 1e-3 * x], 1)

    case = Naive(Computed(flat), noise(1, 8, 8), [MultiClassMask(0)], SimpleInferer())
    result = explained(FeatureVisualization(n_iter=3), case)
    assert 0 < result.note(0)["objective_rise"] < 0.25
    assert any("a rise of 0.25 is required" in w for w in case.objective.context.progress.warnings)
    quiet = Naive(Computed(flat), noise(1, 8, 8), [MultiClassMask(0)], SimpleInferer())
    explained(FeatureVisualization(n_iter=3, min_rise=1e-9), quiet)
    assert quiet.objective.context.progress.warnings == []


def test_descend_finds_the_minimum_of_a_quadratic():
    a, b = torch.diag(torch.tensor([1.0, 10, 100], dtype=torch.float64)), noise(3)
    start = noise(3, seed=1)
    kept = start.clone()
    end, curve = descend(start, lambda x: (float(((x @ a @ x) / 2 - b @ x).detach()), (a @ x - b).detach()), 40)
    assert_equal(end, torch.linalg.solve(a, b))
    assert torch.equal(start, kept)
    assert curve[-1] < curve[0]


def test_names():
    assert METHODS.get("layer_visualization") is METHODS.get("CNNLayerVisualization") is FeatureVisualization
    for cls in (FeatureVisualization, ClassImage, DeepDream, InvertedRepresentation):
        method = METHODS.create(cls)
        assert (method.produces, method.additive, method.signed) == ("synthesised image", False, False)
        assert method.reference


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FeatureVisualization(channel=1), "give layer"),
        (lambda: FeatureVisualization("a", neuron="centre"), "channel"),
        (lambda: FeatureVisualization("a", 1, "middle"), "centre"),
        (lambda: FeatureVisualization(parametrisation="dct"), "fourier"),
        (lambda: FeatureVisualization(n_iter=0), "n_iter"),
        (lambda: FeatureVisualization(lr=0), "lr"),
        (lambda: FeatureVisualization(extent="case"), "extent"),
        (lambda: FeatureVisualization(scale=(1,)), "scale"),
        (lambda: FeatureVisualization(backend="keras"), "lucent"),
        (lambda: ClassImage(regularization=-1.0), "regularization"),
        (lambda: ClassImage(rms=0), "rms"),
    ],
)
def test_what_is_refused_at_once(make, text):
    with pytest.raises(UsageError, match=text):
        make()


def test_what_is_refused_at_the_network():
    case = Naive(small(), noise(1, 8, 20))
    for method, text in [
        (FeatureVisualization("a", 5), "5 channels"),
        (FeatureVisualization("a", 1, (0, 99)), "outside the canvas"),
        (FeatureVisualization("z"), "no layer"),
        (FeatureVisualization(intensity=(1, 0)), "low below high"),
        (FeatureVisualization(intensity=[(0, 1), (0, 1)]), "intensity"),
    ]:
        with pytest.raises(UsageError, match=text):
            explained(method, case)
    assert not any(m._forward_hooks for m in case.net.modules())
