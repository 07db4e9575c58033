"""Draw every method on two networks, in slices: the gallery of the documentation.

    python benchmarks/gallery.py [--cases tissue,head] [--methods GradCam,LRP] [--cache DIR] [--output docs/images]
                                 [--only-draw]

* tissue: the bundle brain_tissue_segmentation (batch norm, PReLU) on the middle 64³ voxels of the MNI152 template, one
  window; target: grey matter. Needs the extra `demo`.
* head: the 3D U-Net torchio_unet3d_brain_ixi4mm on a whole head, 4 mm; target: the brain. Needs ESEGETA_SHARED_DATA.
  The scan is not defaced: slices only.

Maps are cached, so that a second call continues an interrupted one and computes only missing maps. Samples and steps
are few: the pictures show what a method looks like, not how well it converges.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from esegeta_monai import Explainer
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import METHODS, Method
from esegeta_monai.targets import MultiClassMask

GRID = "grid(size=24)"
#: Parameters that take minutes, not hours, on two cores; other methods have their defaults.
PARAMETERS: dict[str, dict[str, Any]] = {
    **{name: {"n_steps": 8} for name in ("IntegratedGradients", "BlurIG", "GuidedIG", "LayerConductance")},
    **{name: {"n_steps": 4} for name in ("InternalInfluence", "LayerIntegratedGradients", "XRAI")},
    **{name: {"n_samples": 4} for name in ("SmoothGrad", "SmoothGradSquared", "VarGrad")},
    **{name: {"n_samples": 4} for name in ("GradientShap", "LayerGradientShap")},
    **{name: {"n_samples": 2} for name in ("DeepLiftShap", "LayerDeepLiftShap")},
    **{name: {"max_channels": 12} for name in ("ScoreCam", "AblationCam")},
    "Occlusion": {"window": 16},
    "FeatureAblation": {"feature_mask": GRID},
    "FeaturePermutation": {"feature_mask": GRID},
    "ShapleyValueSampling": {"feature_mask": GRID, "n_samples": 2},
    "KernelShap": {"feature_mask": GRID, "n_samples": 96},
    "Lime": {"feature_mask": GRID, "n_samples": 96},
    "Rise": {"n_masks": 128},
    "Sobol": {"n_samples": 4, "grid": 2},
    "Hsic": {"n_samples": 32, "grid": 4},
    **{name: {"n_iter": 48} for name in ("FeatureVisualization", "ClassImage", "InvertedRepresentation")},
    "DeepDream": {"n_iter": 4},
    "ExtremalPerturbation": {"areas": [0.1], "n_iter": 40},
}
#: Methods that need further cases: here the mirrored image, and the image shifted by four voxels.
NEED_CASES = ("FeaturePermutation", "PatternNet", "PatternAttribution")
WIDTH = 6


def tissue(cache: Path) -> tuple[torch.nn.Module, Tensor, MultiClassMask, dict[int, str]]:
    """Return the bundle's network and the preprocessed middle of the template."""
    reader = BundleReader(Path(__file__).parents[1] / "bundles" / "brain_tissue_segmentation")
    with reader.importable():
        from scripts.anatomy import template_case

        files = template_case(cache / "mni152")
    with reader.importable():
        image = reader.preprocessing({reader.image_key: files["image"]})[reader.image_key]
    start = [(n - 64) // 2 for n in image.shape[1:]]
    cut = image[(slice(None), *(slice(s, s + 64) for s in start))]
    return reader.network, cut, MultiClassMask("grey matter"), reader.class_names


def head(cache: Path) -> tuple[torch.nn.Module, Tensor, MultiClassMask, dict[int, str]]:
    """Return the trained U-Net and the preprocessed head."""
    from tests.support import real
    from tests.test_real_head import head as read_head

    return real.brain_unet(), read_head(), MultiClassMask("brain"), {1: "brain"}


CASES = {"tissue": tissue, "head": head}


def method_of(cls: type[Method], image: Tensor, layer: str) -> Method:
    """Return a method with the gallery's parameters."""
    parameters = dict(PARAMETERS.get(cls.__name__, {}))
    if cls.__name__ in NEED_CASES:
        plain = image.as_tensor() if hasattr(image, "as_tensor") else image
        parameters["cases"] = [plain.flip(1), plain.roll(4, 2)]
    if cls.__name__ == "NeuronConductance":
        parameters |= {"layer": layer, "channel": 0, "n_steps": 4}
    return METHODS.create({"_target_": cls.__name__, **parameters})


def compute(name: str, wanted: list[str] | None, cache: Path) -> None:
    """Compute the missing maps of a case, one file per method."""
    network, image, target, classes = CASES[name](cache)
    explainer = Explainer(network, class_names=classes, on_error="record")
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    prediction = network(image[None].as_tensor()).detach()[0].argmax(0)
    index = next(i for i, text in classes.items() if text == target.class_index)
    np.savez_compressed(folder / "_case.npz", image=image[0].numpy(), mask=(prediction == index).numpy())
    layer = [n for n, m in network.named_modules() if isinstance(m, torch.nn.Conv3d)][1]
    for cls in METHODS:
        file = folder / f"{cls.__name__}.npz"
        if inspect.isabstract(cls) or (wanted and cls.__name__ not in wanted) or (file.is_file() and not wanted):
            continue
        began = time.process_time()
        record: dict[str, Any] = {}
        values = np.zeros(0, dtype=np.float32)
        try:
            method = method_of(cls, image, layer)
        except UsageError as error:  # it needs inputs that the gallery does not have
            record = {"status": "failed", "reason": str(error)}
        else:
            (attribution,) = explainer(image[None], [method], [target])
            keys = ("status", "reason", "signed", "parameters", "units", "completeness_gap", "layer")
            record = {key: attribution.record.get(key) for key in keys}
            if attribution.map is not None:
                values = attribution.map.as_tensor().sum(0).numpy()
        record["cpu_seconds"] = round(time.process_time() - began, 1)
        np.savez_compressed(file, values=values.astype(np.float32), record=json.dumps(record))
        print(name, cls.__name__, record["status"], record["cpu_seconds"], record.get("reason") or "", flush=True)


def draw(name: str, cache: Path, output: Path) -> None:
    """Draw an axial and a coronal slice of every method, signed maps in red and blue, others in a heat map."""
    folder = cache / name
    case = np.load(folder / "_case.npz")
    image, mask = case["image"], case["mask"]
    # through the middle of the explained region
    middle = [
        int(np.average(np.arange(n), weights=mask.sum(tuple(j for j in range(3) if j != i))))
        for i, n in enumerate(mask.shape)
    ]
    panels = [("scan", None, {})]
    for file in sorted(folder.glob("[!_]*.npz"), key=lambda f: f.stem.lower()):
        kept = np.load(file)
        panels.append((file.stem, kept["values"], json.loads(str(kept["record"]))))
    rows = -(-len(panels) // WIDTH)
    figure, axes = plt.subplots(rows, WIDTH, figsize=(2.35 * WIDTH, 1.5 * rows), dpi=75)
    for axis in axes.flat:
        axis.axis("off")
    low, high = np.percentile(image, [1, 99.5])
    grey = _slices(image, middle, low)
    for axis, (title, values, record) in zip(axes.flat, panels):
        axis.imshow(grey, cmap="gray", vmin=low, vmax=high)
        axis.set_title(title, fontsize=8, pad=2)
        if values is None:
            axis.contour(_slices(mask.astype(float), middle), [0.5], colors="yellow", linewidths=0.6)
        elif not values.size or not values.any():
            text = textwrap.fill(str(record.get("reason") or record.get("status")), 46)
            axis.imshow(np.zeros_like(grey), cmap="gray", vmin=0, vmax=1, alpha=0.75)
            axis.text(0.02, 0.95, text, fontsize=4.5, color="white", va="top", transform=axis.transAxes)
        else:
            cut = _slices(values, middle)
            if METHODS.get(title).produces == "synthesised image":
                dark, bright = np.percentile(values, [1, 99.5])
                axis.imshow(_slices(values, middle, dark), cmap="gray", vmin=dark, vmax=bright)
                continue
            limit = float(np.percentile(np.abs(values), 99.8)) or float(np.abs(values).max())
            signed = values.min() < 0
            strength = np.clip(np.abs(cut) / limit, 0, 1)
            if signed:
                colours = np.zeros((*cut.shape, 4))
                colours[..., 0], colours[..., 2] = cut > 0, cut < 0
            else:
                colours = plt.get_cmap("hot")(0.25 + 0.65 * strength)
            colours[..., 3] = strength**0.7
            axis.imshow(colours, interpolation="nearest")
    figure.subplots_adjust(0.005, 0.002, 0.995, 0.985, 0.03, 0.16)
    target = output / f"gallery_{name}.jpg"
    figure.savefig(target, pil_kwargs={"quality": 82, "optimize": True})
    plt.close(figure)
    print(target, f"{target.stat().st_size / 1e3:.0f} kB, {len(panels) - 1} methods")


def _slices(volume: np.ndarray, middle: list[int], fill: float = 0.0) -> np.ndarray:
    """Return axial and coronal slice of a RAS volume side by side: right on the viewer's left, front and top up."""
    axial = volume[::-1, ::-1, middle[2]].T
    coronal = volume[::-1, middle[1], ::-1].T
    tall = max(len(axial), len(coronal))
    parts = [
        np.pad(p, (((tall - len(p)) // 2, -(-(tall - len(p)) // 2)), (1, 1)), constant_values=fill)
        for p in (axial, coronal)
    ]
    return np.concatenate(parts, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="tissue,head")
    parser.add_argument("--methods", help="compute these again")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "esegeta_gallery")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    parser.add_argument("--only-draw", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.cases.split(","):
        if not args.only_draw:
            compute(name, args.methods.split(",") if args.methods else None, args.cache)
        draw(name, args.cache, args.output)


if __name__ == "__main__":
    main()
