"""Measure a cell of the table: what a method gives on an odd case, against the truth."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import esegeta_monai
from esegeta_monai import Attribution, Explainer
from esegeta_monai.errors import EsegetaError
from esegeta_monai.methods.base import METHODS, Method
from tests.odd.base import OddCase
from tests.odd.heads import SYNTHESIS
from tests.odd.pipelines import FOREIGN, PipelineCase
from tests.odd.truth import INDEPENDENT, Truth

__all__ = ["METHOD_NAMES", "VERDICTS", "Outcome", "measure", "method_of", "version"]

VERDICTS = ("right", "handled", "warned", "refused", "none", "open", "error", "wrong")
METHOD_NAMES: list[str] = [cls.__name__ for cls in METHODS]
ADDED = ("GradCam", "GradCamPlusPlus", "HiResCam", "XGradCam", "LayerCam", "LayerGradCam", "LayerGradientXActivation")
ADDED += ("LinearApproximation", "LayerConductance", "InternalInfluence", "LayerIntegratedGradients")
ADDED += ("LayerDeepLift", "LayerDeepLiftShap", "LayerGradientShap", "LayerLRP")
AVERAGED = ("LayerActivation",)
"""Layer methods whose map of a layer with several calls is the sum, or the mean, of those of the calls."""


@dataclass(frozen=True)
class Outcome:
    """The result of one cell.

    Attributes:
        verdict: ``right``; ``handled``: right, and a check of the record names the measure taken; ``warned``: not
            right, with a warning; ``refused``: an error of the package whose message names the cause; ``none``: the
            method applies to no such network, and refuses the twin too; ``open``: what its map of several calls should
            be is not defined; ``error``: another exception; ``wrong``: not right, no word.
        figure: largest difference from the truth, relative to its largest value; None without a map or a truth.
        note: warning, refusal or error.
    """

    verdict: str
    figure: float | None = None
    note: str = ""


def method_of(name: str, case: OddCase, **more: Any) -> Method:
    """Build a method with few steps and samples, the layer and the baseline of the case."""
    cls = next(cls for cls in METHODS if cls.__name__ == name)
    known = {f.name for f in dataclasses.fields(cls)}
    x, x0 = case.plain_image, case.baseline
    wanted: dict[str, Any] = {
        "baseline": x0,
        "layer": case.layer,
        "feature_mask": "grid(size=4)",
        "n_steps": 8,
        "n_samples": 4,
        "n_masks": 8,
        "grid": 3,
        "n_iter": 3,
        "window": 4,
        "n_segments": (4,),
        "cases": [x[0], x0],
        "min_rise": 0.0,
        "octaves": 1,
        "jitter": 0,
        "max_channels": None,
    }
    own: dict[str, dict[str, Any]] = {
        "Captum": {"arguments": {"n_steps": 8}, "name": "Captum"},
        "KernelShap": {"n_samples": 64},
        "Lime": {"n_samples": 64},
        "BlurIG": {"sigma": 1.0},
        "GuidedIG": {"max_dist": 0.1},
        # twins have an identity convolution as the layer, whose negative inputs z⁺ would leave out
        "ConceptRelevance": {"composite": "LRP0"},
        "ContrastiveLRP": {"composite": "EpsilonPlus"},
        "FeatureVisualization": {"channel": 0, "scale": (1.0, 1.0), "rotate": 0.0},
        "DeepDream": {"channel": 0},
        "NeuronConductance": {"channel": 0},
        "LayerActivationGuidedBackprop": {"channel": 0},
        "ExtremalPerturbation": {"areas": 0.2},
        "ClassImage": {"baseline": "mean", "extent": "image"},
        "InvertedRepresentation": {"max_share": 1e9},
        # an unregistered label map, so that the map has all regions
        "LayerFeatureAblation": {"feature_mask": "channels", "baseline": 0.0},
        "LayerFeaturePermutation": {"feature_mask": "channels"},
        "RegionTest": {"cases": [x0, x[0].flip(-1)], "feature_mask": _quarters(x[0])},
    }
    return cls(**{k: v for k, v in {**wanted, **own.get(name, {}), **more}.items() if k in known})


def _quarters(image: Tensor) -> Tensor:
    """Number the halves of an image (C, *spatial) along its last two axes together: labels 1 to 4, (*spatial)."""
    labels = torch.ones(image.shape[1:], dtype=torch.long)
    labels[..., labels.shape[-1] // 2 :] += 1
    labels[..., labels.shape[-2] // 2 :, :] += 2
    return labels


def measure(name: str, case: OddCase, truths: dict[str, Any] | None = None) -> Outcome:
    """Measure one cell.

    Args:
        name: of the method.
        case: the odd case.
        truths: kept between cells of a case, so that the twin is built once.
    """
    truths = {} if truths is None else truths
    if isinstance(case, PipelineCase):
        return _measure_pipeline(name, case, truths)
    right, twin_warnings, refusal = _truth(name, case, truths)
    try:
        attribution = _explain(case, method_of(name, case))
    except EsegetaError as error:
        if refusal is not None:
            return Outcome("none", None, str(refusal))
        if re.search(case.cause, str(error), re.IGNORECASE):
            return Outcome("refused", None, str(error))
        return Outcome("error", None, f"does not name the cause: {error}")
    except Exception as error:  # an exception is a result of the table
        return Outcome("error", None, f"{type(error).__name__}: {error}")
    record = attribution.record
    results = record.get("checks") or []
    checks = [c for c in results if c["verdict"] == "handled"]
    of_checks = [c["text"] for c in results if c["verdict"] == "warned" and c["text"] in record["warnings"]]
    new = [*of_checks, *_new(record["warnings"], twin_warnings)]
    if attribution.map is None:
        denied = right is not None and record["status"] == "empty_target"  # although the target has voxels
        return Outcome("error" if denied else "refused", None, str(record.get("reason")))
    if right is None and (case.twin is not None or name in case.undefined):
        return Outcome("warned" if new else "open", None, new[0] if new else str(refusal or ""))
    if right is None:
        return Outcome("warned" if new else "wrong", None, new[0] if new else "no map can be right")
    figure = deviation(attribution.map.as_tensor(), right)
    if figure <= case.tolerance:
        return Outcome("handled" if checks else "right", figure, checks[0]["text"] if checks else "")
    return Outcome("warned" if new else "wrong", figure, new[0] if new else "")


def _measure_pipeline(name: str, case: PipelineCase, truths: dict[str, Any]) -> Outcome:
    """Measure a method through the command line; the six methods run together, and so do all others."""
    right, twin_warnings, refusal = _truth(name, case, truths)
    group = tuple(n for n in METHOD_NAMES if (n in INDEPENDENT) == (name in INDEPENDENT))
    if group not in truths:
        truths[group] = case.results([method_of(n, case) for n in group])
    if name not in truths[group]:
        return Outcome("error", None, "no entry in run.json")
    status, texts, reason, values = truths[group][name]
    if values is None:
        verdict = "none" if refusal is not None else "error" if FOREIGN.match(reason) else "refused"
        return Outcome(verdict, None, reason)
    new = _new(texts, twin_warnings)
    if right is None or case.place is None:
        return Outcome("warned" if new else "wrong", None, new[0] if new else f"{status}: no map can be right")
    expected = case.place(right)
    if name in SYNTHESIS:  # a synthesised image has one dark value where the network sees nothing
        unseen = 1 - case.place(torch.ones_like(right))
        black = values[unseen.bool()].max() if unseen.any() else right.min()
        expected = expected + unseen * black.clamp(max=0.5 * (right.min() + right.max()))
    figure = deviation(values, expected)
    if figure <= case.tolerance:
        return Outcome("right", figure)
    return Outcome("warned" if new else "wrong", figure, new[0] if new else "")


def deviation(values: Tensor, truth: Tensor) -> float:
    """Return the largest difference relative to the largest value of the truth; infinite for another shape."""
    if values.shape != truth.shape:
        if values.ndim != truth.ndim or values.shape[1:] != truth.shape[1:]:
            return float("inf")
        values, truth = torch.broadcast_tensors(values, truth)
    difference, largest = float((values.double() - truth).abs().max()), float(truth.abs().max())
    return difference if largest == 0 else difference / largest


def _new(texts: list[str], known: list[str]) -> list[str]:
    """Return the warnings that the twin's explanation does not have, whatever the numbers in them."""

    def plain(text: str) -> str:
        return re.sub(r"[\d.]+(e[+-]?\d+)?", "#", text)

    before = {plain(text) for text in known}
    return [text for text in texts if plain(text) not in before]


def _explain(case: OddCase, method: Method) -> Attribution:
    """Explain the odd network as a user does; what it draws is the same each time."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    explainer = Explainer(case.odd(), case.inferer, **case.options)
    maps = list(explainer(case.image, [method], [case.target], **case.call()))
    if len(maps) == 1:
        return maps[0]
    joined = dataclasses.replace(maps[0], map=None)
    joined.map = torch.cat([m.map for m in maps], 0) if all(m.input for m in maps) else None
    return joined


def _truth(name: str, case: OddCase, truths: dict[str, Any]) -> tuple[Tensor | None, list[str], Exception | None]:
    """Return the right map, the warnings of the twin's explanation, and the error of a method that refuses the twin."""
    if case.twin is None or name in case.undefined:
        return None, [], None
    if "truth" not in truths:
        truths["truth"] = Truth(case)
    if name in INDEPENDENT and (right := INDEPENDENT[name](truths["truth"])) is not None:
        texts = _of_twin(case, method_of(name, case))[1] if name == "IntegratedGradients" else []  # of few steps
        return right, texts, None
    if name == "Saliency":
        return truths["truth"].vanilla().abs(), [], None
    layered = any(f.name == "layer" for f in dataclasses.fields(method_of(name, case)))
    if case.parts is None or not layered:
        return _of_twin(case, method_of(name, case))
    if len(case.parts) > 1 and name == "GuidedGradCam":
        cam, (guided, texts, refusal) = truths["truth"].grad_cam(), _of_twin(case, method_of("GuidedBackprop", case))
        return (None if cam is None or guided is None else cam * guided), texts, refusal
    if len(case.parts) > 1 and name not in (*ADDED, *AVERAGED):
        return None, [], None
    total, texts = None, []
    for part in case.parts:
        one_map, more, refusal = _of_twin(case, method_of(name, case, layer=part, relu=False))
        if one_map is None:
            return None, more, refusal
        total = one_map + (0 if total is None else total)
        texts += more
    assert total is not None
    total = total / len(case.parts) if name in AVERAGED else total
    return (total.relu() if getattr(method_of(name, case), "relu", False) else total), texts, None


def _of_twin(case: OddCase, method: Method) -> tuple[Tensor | None, list[str], Exception | None]:
    layered = any(f.name == "layer" for f in dataclasses.fields(method))
    explainer = Explainer(case.ordinary(layered), case.inferer, checks=False, window_batch=1)
    image = case.plain_image
    dtype = next((p.dtype for p in explainer.settings.network.parameters()), image.dtype)
    try:
        (one,) = explainer(image.to(dtype), [method], [case.target if case.twin_target is None else case.twin_target])
    except EsegetaError as error:
        return None, [], error
    if one.map is None:
        return None, [], EsegetaError(str(one.record.get("reason")))
    return one.map.as_tensor().double(), one.record["warnings"], None


@cache
def _package_hash(on_scan: bool) -> str:
    """Return a hash of the sources that decide a map, and for one on the scan's grid also of those that place it."""
    root, digest = Path(esegeta_monai.__file__).parent, hashlib.sha256()
    placing = ("bundle", "cli", "files", "output") if on_scan else ()
    for folder in ("engine", "explain", "methods", "targets", "utils", *placing):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def version(kind: str) -> str:
    """Return a hash of what decides the cells of a kind: the engine, the measurement, and the file of the kind."""
    names = ("tests.odd.base", "tests.odd.truth", "tests.odd.measure", f"tests.odd.{kind}")
    files = [Path(str(importlib.import_module(n).__file__)).read_bytes() for n in names]
    return hashlib.sha256(b"".join([_package_hash(kind == "pipelines").encode(), *files])).hexdigest()[:8]
