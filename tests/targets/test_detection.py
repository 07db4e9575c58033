"""Detected boxes: those of MONAI's RetinaNet detector, and the gradient of their class logit."""

from __future__ import annotations

import pytest
import torch
from monai.apps.detection.networks.retinanet_detector import RetinaNetDetector
from monai.apps.detection.networks.retinanet_network import RetinaNet
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import TargetError, UsageError
from esegeta_monai.methods import InputXGradient, Occlusion, Saliency
from esegeta_monai.targets import Case, DetectedBox, DetectorMap
from tests.support.networks import CONV
from tests.support.objectives import explain, full_gradient, objective_of
from tests.support.tensors import close

SHAPES = {2: [[4, 4], [6, 3]], 3: [[4, 4, 4], [6, 3, 5]]}
CLASSES = 2


class Features(nn.Module):
    """Two levels at strides 2 and 4, without torchvision."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.fine, self.coarse = CONV[dims](1, 8, 4, 2, 1), CONV[dims](8, 8, 4, 2, 1)
        self.out_channels = 8

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.fine(x).relu()
        return {"0": fine, "1": self.coarse(fine).relu()}


def detector(dims: int) -> RetinaNetDetector:
    torch.manual_seed(dims)
    network = RetinaNet(dims, CLASSES, len(SHAPES[dims]), Features(dims), size_divisible=4)
    generator = AnchorGeneratorWithAnchorShape((1, 2), SHAPES[dims])
    whole = RetinaNetDetector(network.eval(), generator)
    for p in network.parameters():
        nn.init.normal_(p, std=0.08 if p.ndim > 1 else 0.01)
    whole.set_box_selector_parameters(
        score_thresh=0.3, topk_candidates_per_level=200, nms_thresh=0.2, detections_per_img=40
    )
    return whole.eval()


def target(dims: int, which: int = 0, **more: object) -> DetectedBox:
    levels = [[[s * scale for s in shape] for shape in SHAPES[dims]] for scale in (1, 2)]
    return DetectedBox(
        which, CLASSES, levels, [2, 4], score_threshold=0.3, candidates=200, nms_threshold=0.2, kept=40, **more
    )


@pytest.mark.parametrize("dims", [2, 3])
def test_boxes_are_those_of_the_detector(dims):
    whole, image = detector(dims), torch.randn(1, 1, *[24] * dims)
    with torch.no_grad():
        (expected,) = whole([image[0]])
        prediction = DetectorMap(whole.network)(image)[0]
    result = target(dims).detections(prediction)
    assert len(result) == len(expected["boxes"]) > 5
    torch.testing.assert_close(torch.tensor([d.box for d in result]), expected["boxes"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(torch.tensor([d.score for d in result]), expected["labels_scores"])
    assert [d.label for d in result] == expected["labels"].tolist()
    assert len({(d.level, d.anchor) for d in result}) > 1
    assert any(d.suppressed for d in result)
    for d in result:  # what is suppressed overlaps and scores lower
        assert all(score <= d.score for score, _ in d.suppressed)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("which", [0, 3])
def test_the_score_is_the_logit_at_the_anchor_and_its_map_the_gradient(dims, which):
    whole, image = detector(dims), torch.randn(1, 1, *[24] * dims)
    network = DetectorMap(whole.network).double()
    o = objective_of(network, image[0].double(), [target(dims, which)])
    result = target(dims).detections(o.prediction)[which]
    x = image.double().requires_grad_(True)
    logits = whole.network(x)["classification"][result.level]
    logit = logits[(0, result.anchor * CLASSES + result.label, *result.position)]
    assert float(logit.detach().sigmoid()) == pytest.approx(result.score, rel=1e-5)
    (gradient,) = torch.autograd.grad(logit, x)
    close(explain(Saliency(abs=False), o).maps, gradient)
    assert float(o.image_values()) == pytest.approx(float(logit), rel=1e-9)
    change = explain(Occlusion(window=8, baseline=0), o).maps[0, 0]
    with torch.no_grad():
        occluded = image.double().clone()
        occluded[(0, 0, *[slice(8, 16)] * dims)] = 0
        rest = whole.network(occluded)["classification"][result.level]
        drop = float(logit - rest[(0, result.anchor * CLASSES + result.label, *result.position)])
    assert float(change[(10,) * dims]) == pytest.approx(drop, abs=1e-9)


def test_coordinates_are_scores_too():
    whole, image = detector(2), torch.randn(1, 1, 24, 24)
    network = DetectorMap(whole.network).double()
    x = image.double()
    codes = whole.network(x)["box_regression"]
    for value, axis in (("centre", 1), ("size", 0)):
        o = objective_of(network, x[0], [target(2, 1, value=value, axis=axis)])
        result = target(2).detections(o.prediction)[1]
        channel = result.anchor * 4 + axis + 2 * (value == "size")
        expected = codes[result.level][(0, channel, *result.position)]
        assert float(o.image_values()) == pytest.approx(float(expected), rel=1e-9)


def test_windows_are_blended():
    """Boxes, score and map of a volume of several windows, against autograd through MONAI's inferer."""
    whole, image = detector(2), torch.randn(1, 24, 40, dtype=torch.float64)
    network = DetectorMap(whole.network).double()
    inferer = SlidingWindowInferer((16, 16), 2, 0.5, "gaussian")
    tried = (objective_of(network, image, [target(2, which)], inferer) for which in range(20))
    o = next(o for o in tried if len(o.windows) > 1)
    close(explain(InputXGradient(), o).maps[0], image * full_gradient(network, image, inferer, o.scores[0]), 1e-9)


def test_a_suppressed_neighbour_is_listed_in_the_record():
    whole, image = detector(2), torch.randn(1, 1, 24, 24)
    network = DetectorMap(whole.network)
    with torch.no_grad():
        result = target(2).detections(network(image)[0])
    number = next(i for i, d in enumerate(result) if d.suppressed)
    (attribution,) = Explainer(network.eval(), head="raw")(image, ["Saliency"], [target(2, number)])
    assert attribution.map is not None
    listed = attribution.record["suppressed_boxes"]
    assert [tuple(entry["box"]) for entry in listed] == [box for _, box in result[number].suppressed]
    assert attribution.record["box"] == list(result[number].box)


def test_errors_name_the_way_out():
    network = DetectorMap(detector(2).network)
    prediction = network(torch.randn(1, 1, 24, 24))[0].detach()
    with pytest.raises(TargetError, match="boxes are detected"):
        target(2, 39).bind(prediction - 50, Case())
    with pytest.raises(TargetError, match="DetectorMap"):
        target(2).bind(prediction[1:], Case())
    with pytest.raises(TargetError, match="multiples of the coarsest stride"):
        network(torch.randn(1, 1, 26, 24))
    with pytest.raises(TargetError, match="no 'classification'"):
        DetectorMap(nn.Identity())(torch.zeros(1, 1, 4, 4))
    with pytest.raises(UsageError, match="strides"):
        DetectedBox(0, 1, [[[4, 4]]], [2, 4])
