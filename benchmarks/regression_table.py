"""The table of all scenarios, and the script that runs them for one checkout; see `regression.py`.

PYTHONPATH=CHECKOUT python benchmarks/regression_table.py RESULT.pt [--only TEXT] [--part I/N]
"""

from __future__ import annotations

import argparse
import logging
import random
import re
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from regression_scenarios import (
    CHEAP,
    CHEAP_METRIC,
    Count,
    Item,
    cheap,
    costs,
    evaluate,
    explain,
    image_of,
    ranks,
    resume,
    transforms,
    write,
)

import esegeta_monai
from esegeta_monai.methods import METHODS, DeepLift, FeatureAblation, GradientShap, IntegratedGradients, Occlusion
from esegeta_monai.metrics import METRICS

Scenario = Callable[[], Iterable[Item]]

SEG, SEG_P = "MultiClassMask(1)", "MultiClassMask(1, output='probability')"
CLS, CLS_P = "ClassScore(1)", "ClassScore(1, output='probability')"


def several(text: str) -> list[str]:
    """Split a text at semicolons and line ends."""
    return [part.strip() for part in re.split("[;\n]", text) if part.strip()]


SEVERAL = f"{SEG}, Component(2, which='largest'), Voxel(0, index=(5, 6)), Box(1, (2, 2), (9, 9), output='probability')"
GRADIENT = several("""
    Saliency(abs=False); IntegratedGradients(n_steps=3, baseline='mean'); IntegratedGradients(n_steps=5)
    IntegratedGradients(baseline=0.5, method='riemann_trapezoid', n_steps=4)
    IntegratedGradients(baseline='blur', tolerance=0.05, max_steps=64)
    IntegratedGradients(baseline=Blur(sigma=1.5, std=0.1), n_steps=2); BlurIG(sigma=2.0, n_steps=3)
    BlurIG(n_steps=4, tolerance=0.1, max_steps=32); GuidedIG(n_steps=4, fraction=0.5, max_dist=0.1)
    GuidedIG(baseline='min', n_steps=4, tolerance=0.2, max_steps=32); GradientShap(n_samples=3, std=0.2)
    GradientShap(baseline='noise', n_samples=3); XRAI(n_segments=(5, 10), n_steps=2)
    XRAI(n_segments=(6,), method='Saliency'); GuidedGradCam(layer='second'); SmoothGrad(n_samples=3, std=0.3)
    SmoothGrad(method='IntegratedGradients(n_steps=2)', n_samples=2)
""")
INSIDE = several("""
    Saliency; InputXGradient; GradCam(layer='second'); GuidedGradCam(layer='second'); LRP; GuidedBackprop; DeepLift
    Occlusion(window=4); Rise(n_masks=6, grid=2); FeatureAblation(feature_mask='grid(5)', baseline=0.0)
    GuidedIG(n_steps=3); KernelShap(n_samples=80, feature_mask='grid(6)'); SmoothGrad(n_samples=2)
""")
CAM = several("""
    GradCam(layer='second', relu=False); GradCam(layer=['first', 'second']); GradCamPlusPlus(layer='first')
    XGradCam(layer='second', relu=False); EigenCam(layer='first'); HiResCam(layer='second', relu=False)
    LayerCam(layer=['first', 'second']); ScoreCam(layer='second', baseline='blur'); AblationCam(layer='first')
    GradCam(layer='nowhere'); Cam(relu=True)
""")
LAYER = several("""
    LayerActivation(layer='second', reduce='channels'); LayerGradCam(layer='second', relu=True)
    LayerActivation(layer='first', reduce='sum'); LayerGradientXActivation(layer='second', reduce='channels')
    LayerConductance(layer='second', rule='left', n_steps=3); LayerConductance(layer='first', n_steps=3)
    InternalInfluence(layer='first', baseline=0.2, n_steps=3); LinearApproximation(layer='second')
    LayerIntegratedGradients(layer='second', method='riemann_trapezoid', n_steps=3); LayerDeepLift(layer='second')
    LayerDeepLiftShap(layer='first', n_samples=2); LayerGradientShap(layer='second', n_samples=2, std=0.1)
    LayerLRP(layer='second', composite='EpsilonGammaBox'); LayerActivationGuidedBackprop(layer='second')
    NeuronConductance(layer='second', channel=0, index=(1, 4), n_steps=3)
    LayerActivationGuidedBackprop(layer='second', channel=2)
""")
RELEVANCE = several("""
    LRP(epsilon=0.01); LRP(composite='EpsilonGammaBox', gamma=0.5); FullGrad(abs=False); ContrastiveLRP(epsilon=0.1)
    ContrastiveLRP(positive=False); ContrastiveExcitationBackprop(positive=False); DeepLift(baseline='mean')
    DeepLift(baseline='noise'); DeepLiftShap(baseline='blur', n_samples=2); Deconvolution
""")
COMPOSITES = ["EpsilonPlusFlat", "EpsilonGammaBox", "EpsilonAlpha2Beta1", "DeepTaylor", "Epsilon", "LRP0"]
RELEVANCE += [f"LRP(composite='{name}')" for name in COMPOSITES]
PERTURBATION = several("""
    Occlusion(window=3, stride=2); Occlusion(window=(4, 6), baseline='mean'); Occlusion(window=5, per_channel=True)
    Occlusion(window=6, stride=4, baseline='blur'); FeatureAblation(feature_mask='grid(4)')
    FeatureAblation(feature_mask='channels', baseline='blur')
    FeatureAblation(feature_mask=grid(6, per_channel=True))
    FeatureAblation(feature_mask=supervoxels(n_segments=8, mask='everything')); ChannelShapley(baseline='mean')
    ShapleyValueSampling(n_samples=3, feature_mask='grid(6)'); KernelShap(n_samples=96, feature_mask='grid(6)')
    KernelShap(n_samples=80, feature_mask='grid(6)', baseline='minimum')
    Lime(n_samples=24, feature_mask='grid(6)', distance_metric='euclidean')
    Lime(n_samples=24, feature_mask='grid(6)', num_features=3, feature_selection='highest_weights', alpha=0.1)
    Rise(n_masks=12, grid=3, p=0.3); Rise(n_masks=12, grid=(2, 4), score='change'); Sobol(n_samples=4, grid=2)
    Hsic(n_samples=16, grid=3, baseline='blur'); ExtremalPerturbation(areas=[0.1, 0.3], n_iter=4)
    ExtremalPerturbation(variant='preserve', n_iter=4, step=3, sigma=2.0, baseline='mean')
""")
SYNTHESIS = several("""
    FeatureVisualization(layer='second', channel=1, n_iter=4, parametrisation='voxel')
    FeatureVisualization(layer='first', channel=1, neuron='centre', n_iter=4, decay=0.1, extent='window')
    ClassImage(n_iter=4, regularization=0.1); DeepDream(layer='first', n_iter=3, octaves=1)
    InvertedRepresentation(layer='second', n_iter=4)
""")
FAMILIES = {"gradient": GRADIENT, "cam": CAM, "layer": LAYER, "relevance": RELEVANCE, "perturbation": PERTURBATION}
TOGETHER = {
    "gradients and CAMs": "Saliency, InputXGradient, GradCam('second'), GradCamPlusPlus('second'), EigenCam, LayerCam",
    "all families": "Saliency, GradCam, LRP, Occlusion(6), IntegratedGradients(n_steps=3), DeepLift, GuidedBackprop",
    "twins": "Saliency, Saliency(abs=False), GradCam(layer='first'), GradCam(layer='second'), LRP, LRP(epsilon=0.1)",
}
TARGETS_2D = several("""
    MultiClassMask(1, output='probability'); MultiClassMask(2, reduction='mean'); Component(2)
    Component(1, which=2, output='probability'); PredictedClasses; ThresholdMask(0.3, channel=1)
    ThresholdMask(0.2, channel=1, value='raw', output='probability'); MultiClassMask(7); Voxel(index=(5, 6))
    Box(1, (1, 1), (7, 9), reduction='mean'); OutputValue(1, reference=0.5); LayerNeuron('second', 1, index=(2, 3))
    LabelMask('label', label=1, class_index=1); Errors('label', 'false_positive', 1)
""")
RESUMED = several("""
    Occlusion(window=3, stride=2); Occlusion(window=3, stride=2, per_channel=True); FeatureAblation('grid(3)')
    KernelShap(80, 'grid(6)'); Lime(40, 'grid(6)'); Rise(30, grid=2); Sobol(4, grid=3); Hsic(16, grid=2)
    ShapleyValueSampling(4, 'grid(6)')
""")
RANKED = several("""
    Saliency; IntegratedGradients(n_steps=3); SmoothGrad(n_samples=3); GradCam; EigenCam; LRP; DeepLift
    Occlusion(window=4); KernelShap(80, 'grid(6)'); Rise(8, grid=2); GuidedIG(n_steps=3); FullGrad
    LayerConductance(layer='second', n_steps=3); Saliency, GradCam, InputXGradient; ScoreCam(max_channels=3)
""")
ON_AMP = several("""
    Saliency; InputXGradient; IntegratedGradients(n_steps=4); GradCam; LRP; Occlusion(window=4)
    SmoothGrad(n_samples=4); KernelShap(80, 'grid(6)'); LayerActivation
""")
WRITTEN = "InputXGradient, GradCam, Occlusion(window=4), FeatureAblation('channels'), LayerActivation(layer='second')"


def tensors(kind: str) -> list[Any]:
    """Return methods whose parameters are tensors."""
    other, mask = image_of(kind, seed=4)[0], (image_of(kind)[0, :1] > 0.5).long()
    baselines = {"_target_": "Cases", "files": [other, other + 0.1]}
    return [
        IntegratedGradients(baseline=other, n_steps=3),
        DeepLift(baseline=other),
        GradientShap(baseline=baselines, n_samples=3),
        FeatureAblation(feature_mask=mask + 1),
        Occlusion(window=5, baseline=other),
    ]


def further_inputs(kind: str) -> dict[str, Any]:
    return {"network_kwargs": {"condition": image_of(kind, seed=8) / 4}}


def named_inputs(kind: str) -> dict[str, Any]:
    return {"image": {"only": image_of(kind)}}


def with_label(kind: str) -> dict[str, Any]:
    label = (image_of(kind, seed=3)[0, :1] > 0.8).long()
    return {"data": {"label": label}}


def bad_case(kind: str) -> dict[str, Any]:
    image = image_of(kind, 3)
    image[1, 0, 3, 3] = torch.nan
    return {"image": image}


def table() -> Iterator[tuple[str, Scenario]]:
    """Yield name and function of all scenarios."""
    for kind in ("seg2", "unet2", "seg3", "unet3", "cls2", "cls3"):
        target = CLS if kind.startswith("cls") else SEG
        more = {} if kind == "seg2" else {"feature_mask": "grid(6)"}
        for name, make in cheap(METHODS, {**CHEAP, **more}, kind):
            yield f"default/{kind}/{name}", partial(explain, kind, lambda make=make: [make()], target)
    for kind, target in (("seg2", SEG_P), ("cls2", CLS_P)):
        for name, make in cheap(METHODS, {**CHEAP, "feature_mask": "grid(6)"}, kind):
            yield f"probability/{kind}/{name}", partial(explain, kind, lambda make=make: [make()], target)
    for kind, target in (("seg2", SEVERAL), ("cls2", CLS), ("seg2", SEG_P)):
        for family, methods in {**FAMILIES, "synthesis": SYNTHESIS if target != SEG_P else []}.items():
            for method in methods:
                yield f"{family}/{kind}/{method}/{target}", partial(explain, kind, method, target)
    for wrapper in ("SmoothGrad", "SmoothGradSquared", "VarGrad"):
        for inner in INSIDE:
            method = f"{wrapper}(method={inner}, n_samples=3)"
            yield f"inside/seg2/{method}", partial(explain, "seg2", method, f"{SEG}, Component(2)")
            if wrapper == "SmoothGrad":
                yield (
                    f"inside/cls2/{method}",
                    partial(explain, "cls2", method, f"{CLS}, {CLS_P}"),
                )
                yield f"inside/probability/{method}", partial(explain, "seg2", method, SEG_P)
    for name, methods in TOGETHER.items():
        for kind, targets in (("seg2", SEVERAL), ("seg3", f"{SEG}, Component(2)"), ("cls3", "ClassScore(top_k=2)")):
            yield f"together/{kind}/{name}", partial(explain, kind, methods, targets, batch=2)
    for target in [*TARGETS_2D, SEVERAL]:
        methods = "Saliency, GradCam, LRP, Occlusion(window=6), SmoothGrad(n_samples=2)"
        yield f"target/{target}", partial(explain, "seg2", methods, target, call=with_label)
    yield "tensors/seg2", partial(explain, "seg2", partial(tensors, "seg2"), f"{SEG}, {SEG_P}")
    yield "tensors/cls2", partial(explain, "cls2", partial(tensors, "cls2"), CLS)
    few = "Saliency(abs=False), IntegratedGradients(n_steps=2), GradCam, Occlusion(window=6), SmoothGrad(n_samples=2)"
    yield "inputs/condition", partial(explain, "seg2", few, SEG, call=further_inputs)
    yield "inputs/named", partial(explain, "seg2", few, SEG, call=named_inputs)
    yield "inputs/bad case", partial(explain, "seg2", few, SEG, call=bad_case)
    yield "inputs/raise", partial(explain, "seg2", "GradCam(layer='nowhere')", SEG, on_error="raise")
    yield "inputs/unknown method", partial(explain, "seg2", "Salience", SEG)
    yield "inputs/wrong parameter", partial(explain, "seg2", "Occlusion(window='wide')", SEG)
    for batch in (1, 5):
        yield f"inputs/window batch {batch}", partial(explain, "seg2", few, SEG, window_batch=batch, seed=3)
    for kind in ("seg2", "cls2"):
        for name, make in cheap(METRICS, CHEAP_METRIC, kind):
            target = SEG if kind == "seg2" else CLS
            yield f"metric/{kind}/{name}", partial(evaluate, kind, lambda make=make: [make()], target)
        both = "Saliency, GradCam, Occlusion(window=6)"
        yield f"metric/{kind}/by default", partial(evaluate, kind, lambda: None, target, both)
    yield "metric/seg3/by default", partial(evaluate, "seg3", lambda: None, f"{SEG}, {SEG_P}", "Saliency")
    for method in RESUMED:
        for output in ("logit", "probability"):
            for how in ("limit", "network"):
                yield f"resume/{how}/{output}/{method}", partial(resume, method, output, how)
    yield "resume/limit/blocks", partial(resume, "Rise(800, grid=3)", "probability", "limit", window_batch=64)
    yield "ranks/seg2", partial(ranks, "seg2", RANKED, (f"{SEG}, Component(2)", SEG_P))
    for kind, target in (("seg2", SEG), ("seg2", SEG_P), ("cls2", CLS)):
        for name, make in cheap(METHODS, {**CHEAP, "feature_mask": "grid(6)"}, kind):
            yield f"costs/{kind}/{name}/{target}", partial(costs, kind, lambda make=make: [make()], target)
    for method in ON_AMP:
        for kind, target in (("seg2", f"{SEG}, {SEG_P}"), ("cls2", CLS)):
            yield f"amp/{kind}/{method}", partial(explain, kind, method, target, amp=True, dtype=torch.float32)
    yield "write", partial(write, WRITTEN, SEG)
    yield "transforms", transforms


class Heard(logging.Handler):
    """Log handler that collects warnings of the package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname}: {record.getMessage()}")


def outcome(scenario: Scenario) -> dict[str, Any]:
    """Collect the items of a scenario until it ends or fails."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    Count.reset()
    heard, began, error, items = Heard(), time.perf_counter(), None, []
    logger = logging.getLogger("esegeta_monai")
    logger.addHandler(heard)
    logger.propagate = False
    with warnings.catch_warnings(record=True) as python_warnings:
        warnings.simplefilter("always")
        try:
            for item in scenario():
                items.append(item)
        except Exception as e:  # an exception is a result
            error = {"error": f"{type(e).__name__}: {e}", "where": traceback.format_exc()}
    logger.removeHandler(heard)
    warned = [f"{w.category.__name__}: {w.message}" for w in python_warnings if "esegeta_monai" in w.filename]
    return {
        "items": items,
        "error": error,
        "said": [*heard.lines, *warned],
        "calls": Count.calls,
        "rows": Count.rows,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--only", default="", help="run scenarios whose name contains this text")
    parser.add_argument("--part", default="0/1", help="I/N: every Nth scenario from the Ith on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_warn_always(True)
    part, parts = map(int, args.part.split("/"))
    chosen = [(name, scenario) for name, scenario in table() if args.only.lower() in name.lower()][part::parts]
    outcomes = {name: outcome(scenario) for name, scenario in chosen}
    torch.save({"package": str(Path(esegeta_monai.__file__).resolve().parent), "scenarios": outcomes}, args.result)


if __name__ == "__main__":
    main()
