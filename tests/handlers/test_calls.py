"""Evaluators with an iteration of their own: what they hand to the inferer beside the image is used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.engines.utils import IterationEvents
from monai.inferers import SimpleInferer
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from torch import Tensor, nn

from esegeta_monai.handlers import ExplanationHandler
from esegeta_monai.handlers.calls import InfererCalls

NAMES = {0: "background", 3: "spleen", 5: "liver"}


class Prompted(nn.Module):
    """A channel for each class asked for, each another filter of the image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.filters = nn.Conv2d(1, 8, 3, padding=1)

    def forward(self, x: Tensor, class_vector: Tensor) -> Tensor:
        return self.filters(x)[:, class_vector.flatten()]


class PromptedInferer:
    """As VISTA3D's: nothing without prompts."""

    def __call__(self, inputs: Tensor, network: nn.Module, class_vector: Tensor) -> Tensor:
        return network(inputs, class_vector=class_vector)


class PromptedEvaluator(SupervisedEvaluator):
    """As VISTA3D's: the prompts of the batch go to the inferer, past ``prepare_batch``."""

    def _iteration(self, engine: Any, batchdata: dict[str, Tensor]) -> dict[str, Any]:
        asked = torch.tensor([[3], [5]])
        engine.state.output = {"image": batchdata["image"]}
        with engine.mode(engine.network):
            engine.state.output["pred"] = engine.inferer(
                inputs=batchdata["image"], network=engine.network, class_vector=asked
            )
        engine.fire_event(IterationEvents.FORWARD_COMPLETED)
        engine.fire_event(IterationEvents.MODEL_COMPLETED)
        return engine.state.output


def loader(tmp_path: Path) -> DataLoader:
    values = np.random.default_rng(0).random((12, 10)).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "scan.nii.gz")
    transform = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])
    return DataLoader(Dataset([{"image": str(tmp_path / "scan.nii.gz")}], transform), batch_size=1)


@pytest.mark.filterwarnings("ignore:PromptedInferer")
def test_prompts_reach_the_explanation_and_name_its_channels(tmp_path: Path) -> None:
    network, inferer = Prompted(), PromptedInferer()
    handler = ExplanationHandler(
        ["Saliency(abs=False)"], ["MultiClassMask('liver')"], tmp_path / "out", class_names=NAMES, pictures=False
    )
    data = loader(tmp_path)
    evaluator = PromptedEvaluator(
        torch.device("cpu"), data, network, inferer=inferer, val_handlers=[handler], decollate=False
    )
    evaluator.run()
    assert evaluator.inferer is inferer  # as it was
    image = next(iter(data))["image"].as_tensor().requires_grad_(True)
    prediction = network(image, torch.tensor([[3], [5]]))
    (expected,) = torch.autograd.grad(prediction[0, 1][prediction[0].argmax(0) == 1].sum(), image)
    (path,) = (tmp_path / "out").rglob("*_attr.nii.gz")
    np.testing.assert_allclose(np.asarray(nib.load(path).dataobj).squeeze(), expected[0, 0], rtol=0, atol=1e-6)
    assert json.loads(path.with_suffix("").with_suffix(".json").read_text(encoding="utf-8"))["class"] == "liver"


def test_monais_own_evaluator_is_left_alone(tmp_path: Path) -> None:
    inferer = SimpleInferer()
    handler = ExplanationHandler(["Saliency"], ["MultiClassMask(0)"], tmp_path / "out", pictures=False)
    network = nn.Conv2d(1, 2, 3, padding=1)
    evaluator = SupervisedEvaluator(
        torch.device("cpu"), loader(tmp_path), network, inferer=inferer, val_handlers=[handler]
    )
    seen = []
    evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, lambda engine: seen.append(engine.inferer))
    evaluator.run()
    assert seen == [inferer]


def test_calls_are_kept_and_attributes_pass_through() -> None:
    calls = InfererCalls(SimpleInferer())
    assert calls(torch.ones(1), lambda x, *more, **named: x + more[0] + named["b"], 2, b=3) == 6
    assert (calls.args, calls.kwargs) == ((2,), {"b": 3})
    assert calls.inferer.__class__ is SimpleInferer
    with pytest.raises(AttributeError):
        _ = calls.roi_size
