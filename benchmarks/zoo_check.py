"""Check one bundle in its own process: compare the gradient with PyTorch's autograd through the bundle's inferer.

It also writes the overlay, adds random weights if there are none, and chooses a class that they predict. `zoo.py` calls
it; the result is check.json beside the job file.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.engines.utils import default_prepare_batch
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.bundle import BundleReader
from esegeta_monai.bundle.overlay import chosen_output
from esegeta_monai.cli.main import main as command
from esegeta_monai.engine.network.model import select_output
from esegeta_monai.methods import Saliency


def put_weights(reader: BundleReader) -> str:
    """Write random weights (seed 0) if the bundle's checkpoint is missing; return which weights are used."""
    source = reader.weight_source
    if source.path.is_file():
        return "its own"
    torch.manual_seed(0)
    state = reader.network.state_dict()
    source.path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({source.key: state} if source.key and source.key != "model" else state, source.path)
    return "random"


def batch_of(reader: BundleReader) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Return image (B, C, *spatial) and further inputs of the first batch, as the evaluator prepares them."""
    loader = reader.resolve("evaluator::val_data_loader")
    with reader.importable():
        batch = next(iter(loader))
    if isinstance(batch, list):  # of a detector: images of different shapes
        return batch[0][reader.image_key][None], (), {}
    prepare = default_prepare_batch
    if "evaluator::prepare_batch" in reader.parser:
        prepare = reader.resolve("evaluator::prepare_batch")
    prepared = prepare(batch, torch.device("cpu"), False)
    args, kwargs = (prepared[2], prepared[3]) if len(prepared) == 4 else ((), {})
    return prepared[0], tuple(args), dict(kwargs)


def choose(prediction: Tensor, sigmoid: bool, regression: bool) -> tuple[str, int, Tensor]:
    """Choose a target with voxels for a prediction (K, *spatial); return its text, channel and mask (*spatial)."""
    if prediction.ndim == 1 or prediction[0].numel() == 1:
        channel = int(prediction.flatten().argmax())
        return f"ClassScore({channel})", channel, torch.ones_like(prediction[channel], dtype=torch.bool)
    if regression:
        return "OutputValue(channel=0)", 0, torch.ones_like(prediction[0], dtype=torch.bool)
    if sigmoid or prediction.shape[0] == 1:
        channel = int((prediction > 0).flatten(1).sum(1).argmax())
        mask = prediction[channel] > 0
        if not mask.any():
            return (
                f"ThresholdMask(0.5, channel={channel}, above=False)",
                channel,
                torch.sigmoid(prediction[channel]) <= 0.5,
            )
        return f"ThresholdMask(0.5, channel={channel})", channel, torch.sigmoid(prediction[channel]) > 0.5
    counts = torch.bincount(prediction.argmax(0).flatten(), minlength=prediction.shape[0])
    counts[0] = min(int(counts[0]), 1)  # background only if nothing else is predicted
    channel = int(counts.argmax())
    return f"MultiClassMask({channel})", channel, prediction.argmax(0) == channel


def main(job_file: Path) -> None:
    job = json.loads(job_file.read_text(encoding="utf-8"))
    if command(job["overlay"]):
        raise SystemExit("no overlay could be written")
    overrides = {**job["overrides"], **job["crop"].get("overrides", {})}
    for key in ("dataloader", "data_loader"):
        overrides[f"{key}#num_workers"] = 0
    probe = BundleReader(job["bundle"], job["config"], weights="optional")
    overrides = {k: v for k, v in overrides.items() if "num_workers" not in k or k.split("#")[0] in probe.parser}
    reader = BundleReader(job["bundle"], job["config"], overrides, weights="optional")
    weights = put_weights(BundleReader(job["bundle"], job["config"], overrides, weights="optional"))
    reader.weights = "required"
    network, inferer = reader.network, reader.inferer
    image, args, kwargs = batch_of(reader)
    given = job["crop"].get("kwargs", {})
    kwargs.update({k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()})
    crop = job["crop"].get("size")
    if crop:
        image = image[(..., *[slice(0, n) for n in crop])]
    image = image[:1]
    plain = image.as_tensor() if isinstance(image, MetaTensor) else image
    output = chosen_output(reader.metadata)
    text = json.dumps([reader.parser[k] for k in ("postprocessing",) if k in reader.parser], default=str)
    sigmoid = '"sigmoid": true' in text or job["crop"].get("sigmoid", False)
    regression = "OutputValue" in (Path(job_file).parent / "explain.json").read_text(encoding="utf-8")
    x = plain.detach().clone().float().requires_grad_(True)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    raw = inferer(x, network, *args, **kwargs)
    prediction = select_output(raw, output)
    target, channel, mask = choose(prediction[0].detach(), sigmoid, regression)
    score = prediction[0][channel][mask]
    (expected,) = torch.autograd.grad(score.mean() if regression else score.sum(), x)  # `OutputValue` is a mean
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explainer = Explainer(network, inferer, output=output, class_names=reader.class_names)
        (attribution,) = explainer(
            image.detach().float(), [Saliency(abs=False)], [target], network_args=args, network_kwargs=kwargs
        )
    largest = float(expected.abs().max())
    difference = float((attribution.map.as_tensor() - expected[0]).abs().max())
    check = {
        "run_id": reader.run_id,
        "weights": weights,
        "network": type(network).__name__,
        "inferer": type(inferer).__name__,
        "image": list(image.shape),
        "target": target,
        "voxels": int(mask.sum()),
        "deviation": difference / largest if largest else None,
        "windows": attribution.record["windows_total"],
    }
    (job_file.parent / "check.json").write_text(json.dumps(check), encoding="utf-8")
    print(json.dumps(check, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
