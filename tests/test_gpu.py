"""On a CUDA device: the maps of the CPU, volumes apart from windows, half precision, memory that runs out."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai import Explainer
from esegeta_monai.methods import (
    LRP,
    ClassImage,
    DeepDream,
    DeepLift,
    FeatureVisualization,
    GradCam,
    GuidedBackprop,
    IntegratedGradients,
    InvertedRepresentation,
    LayerConductance,
    Method,
    Occlusion,
    Rise,
    Saliency,
    SmoothGrad,
)
from esegeta_monai.methods.precision import AGREES, SURE
from esegeta_monai.targets import Box, MultiClassMask
from tests.networks import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

METHODS: list[Method] = [
    Saliency(),
    IntegratedGradients(n_steps=4),
    SmoothGrad(n_samples=2),
    GuidedBackprop(),
    GradCam(relu=False),
    LayerConductance(n_steps=4),
    DeepLift(),
    LRP(),
    Occlusion(window=6),
    Rise(n_masks=8, grid=2),
]
SYNTHESIS: list[Method] = [
    FeatureVisualization(n_iter=12, jitter=1, rotate=1),
    ClassImage(n_iter=6),
    DeepDream(octaves=2, octave_scale=1.2, n_iter=3),
    InvertedRepresentation(n_iter=6),
]
NETWORKS = ["UNet_instance", "UNet_batch", "SegResNet", "SwinUNETR"]


def study(name: str, dtype: torch.dtype = torch.float64):
    """A network, a volume of several gaussian windows, and the inferer."""
    case = build(name, 3)
    image = torch.cat([case.image, case.reference[..., : case.roi[-1] // 2]], -1).to(dtype)
    return case, case.network.to(dtype), image, SlidingWindowInferer(case.roi, 2, 0.5, "gaussian")


@pytest.mark.parametrize("volumes", ["cuda", "cpu"])
@pytest.mark.parametrize("name", NETWORKS)
def test_maps_are_those_of_the_cpu(name, volumes):
    case, network, image, inferer = study(name)
    on_cpu = list(Explainer(network, inferer, "cpu", output=case.output)(image, METHODS, [MultiClassMask(1)]))
    network.cuda()
    explainer = Explainer(network, inferer, "cuda", volume_device=volumes, output=case.output)
    on_gpu = list(explainer(image, METHODS, [MultiClassMask(1)]))
    for here, there in zip(on_cpu, on_gpu):
        scale = here.map.abs().max()
        assert scale > 0
        assert there.map.device.type == volumes
        assert float((here.map - there.map.cpu()).abs().max() / scale) <= 1e-8, here.method.name
        assert there.record["peak_memory_bytes"] > 0


@pytest.mark.parametrize("volumes", ["cuda", "cpu"])
@pytest.mark.parametrize("name", NETWORKS)
def test_images_are_synthesised_as_on_the_cpu(name, volumes):
    """They begin where the CPU begins and get as far in the same direction; further on, L-BFGS and Adam amplify
    rounding, so that voxels need not agree."""
    case, network, image, inferer = study(name)
    on_cpu = list(Explainer(network, inferer, "cpu", output=case.output)(image, SYNTHESIS, [MultiClassMask(1)]))
    network.cuda()
    explainer = Explainer(network, inferer, "cuda", volume_device=volumes, output=case.output)
    for here, there in zip(on_cpu, explainer(image, SYNTHESIS, [MultiClassMask(1)])):
        assert there.map.device.type == volumes
        assert bool(torch.isfinite(there.map).all())
        assert there.record["curve"][0] == pytest.approx(here.record["curve"][0], rel=1e-6)
        for result in (here.record, there.record):
            start, end, sign = result.get("objective_start"), result.get("objective_end"), 1
            if start is None:  # an inversion comes nearer
                start, end, sign = result["distance_start"], result["distance_end"], -1
            assert sign * (end - start) > 0, here.method.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_is_like_single_or_falls_back(name, dtype):
    case, network, image, inferer = study(name, torch.float32)
    network.cuda()
    with torch.no_grad():
        prediction = inferer(image.cuda(), network)  # one question for both: the target's voxels are read off it
    single = list(
        Explainer(network, inferer, "cuda", output=case.output)(
            image, METHODS, [MultiClassMask(1)], prediction=prediction
        )
    )
    explainer = Explainer(network, inferer, "cuda", amp=True, amp_kwargs={"dtype": dtype}, output=case.output)
    for full, half in zip(single, explainer(image, METHODS, [MultiClassMask(1)], prediction=prediction)):
        record, name = half.record, full.method.name
        pair = torch.stack([full.map.flatten().double().cpu(), half.map.flatten().double().cpu()])
        correlation = float(torch.corrcoef(pair)[0, 1])
        if full.method.full_precision or record["amp_fallback"] is not None:
            assert float((pair[0] - pair[1]).abs().max() / pair[0].abs().max()) <= 1e-4, name
        else:
            assert record["amp_correlation"] >= SURE, name
            assert correlation >= AGREES, name


def test_underflow_in_half_precision_is_computed_again():
    """Gradients of 1e-16 through weights of 1e-4, which no scale of the cotangent keeps."""
    network = torch.nn.Sequential(*[torch.nn.Conv2d(1, 1, 1) for _ in range(4)]).eval()
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, 1e-4)
    network.cuda()
    image, target, inferer = torch.rand(1, 1, 12, 12), Box(0, (2, 2), (10, 10)), SlidingWindowInferer((8, 8), 2, 0.5)
    (full,) = Explainer(network, inferer, "cuda")(image, [Saliency()], [target])
    (half,) = Explainer(network, inferer, "cuda", amp=True)(image, [Saliency()], [target])
    assert half.record["amp"] == "torch.float16"
    assert half.record["amp_fallback"].startswith("underflow")
    assert full.record["status"] == half.record["status"] == "ok"
    assert torch.allclose(half.map, full.map, rtol=1e-5, atol=0)


def test_memory_that_runs_out_halves_the_window_batch():
    _, network, _, _ = study("UNet_batch", torch.float32)
    network.cuda()
    image = torch.rand(1, 1, 96, 96, 96)
    many = SlidingWindowInferer((64, 64, 64), 27, 0.75, "gaussian")
    explainer = Explainer(network, many, "cuda", volume_device="cpu", window_batch=27)
    (whole,) = explainer(image, [Saliency()], [MultiClassMask(1)])
    needed = whole.record["peak_memory_bytes"]  # what tensors held; what the allocator keeps beside it, it gives back
    assert needed > 200e6  # so that what libraries hold themselves does not matter
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    try:
        (part,) = explainer(image, [Saliency()], [MultiClassMask(1)])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert part.record["window_batch"] < whole.record["window_batch"]
    assert any("out of memory" in w for w in part.record["warnings"])
    assert float((part.map - whole.map).abs().max() / whole.map.abs().max()) <= 1e-4
