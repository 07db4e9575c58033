"""The numeric checks, one small function each, and the table of rows: method, parameters, check.

A check gets a `Sight` (the reference values, computed naively) and a function that asks for the map under given
parameters, and returns a `Figure`. A check never passes merely because the method ran or a shape fits. The letters:
**G** equals autograd through the whole inferer, **C** complete, **R** conserved, with the relevance that biases absorb,
**N** equals the naive whole-volume computation, **J** equals the rule applied to autograd's own graph.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import esegeta_monai.methods as methods
from esegeta_monai import Explainer
from esegeta_monai.engine.baselines import gaussian_blur
from esegeta_monai.engine.feature_masks import Supervoxels
from esegeta_monai.engine.rules import COMPOSITES, Relevance, excitation, lrp
from esegeta_monai.errors import MethodError, RuleError
from esegeta_monai.methods import Method
from tests.compatibility.attention import attention_blocks, attention_map
from tests.compatibility.graph import modified_gradient
from tests.compatibility.patterns import Patterned
from tests.compatibility.sight import Sight, tail
from tests.methods.path.test_xrai import naive as naive_ranking
from tests.methods.relevance.test_salient import naive as naive_saliency
from tests.networks import CLASSIFICATION
from tests.support.layers import UP
from tests.support.objectives import explain

__all__ = ["EXCEPTIONS", "ROWS", "Answer", "Figure", "NotApplicable", "Row", "measure", "ours"]

EXACT = 1e-10  # float64: windowed against whole-volume autograd; ours against an oracle that computes the same
COMPLETE = 1e-9  # float64: completeness of DeepLIFT, conservation of LRP
INTEGRATED = 1e-3  # completeness of integrated and sampled methods


@dataclass(frozen=True)
class Figure:
    """The value that a check measured, and its tolerance.

    Attributes:
        capped: the tolerance was not reached within the cap of steps, which the note states.
    """

    value: float
    tolerance: float
    note: str = ""
    capped: bool = False

    @property
    def green(self) -> bool:
        return self.value <= self.tolerance


@dataclass(frozen=True)
class Answer:
    """A map (C, *spatial) and the notes of its method."""

    map: Tensor
    notes: Mapping[str, Any] = field(default_factory=dict)


class Ask(Protocol):
    """Return the map under these parameters; parameters that are functions are called with the sight."""

    def __call__(self, sight: Sight, **parameters: Any) -> Answer: ...


Check = Callable[[Sight, Ask], Figure]


class NotApplicable(Exception):  # noqa: N818 - it is an answer, not an error
    """The method does not apply to this network; the message gives the reason in one sentence."""


# -- the checks -----------------------------------------------------------------------------------------------------


def deviation(values: Tensor, truth: Tensor) -> float:
    """Return the largest difference relative to the largest value of the truth."""
    if values.shape != truth.shape:
        values = values.expand_as(truth)
    if not bool(truth.any()):  # a map of zeros, recorded as such: no voxel may differ
        return float(values.abs().max())
    return float((values.double() - truth).abs().max() / truth.abs().max())


def equals(truth: Callable[[Sight], Tensor], tolerance: float = EXACT, **parameters: Any) -> Check:
    """Check that the map equals the naive computation."""

    def check(sight: Sight, ask: Ask) -> Figure:
        return Figure(deviation(ask(sight, **parameters).map, truth(sight)), tolerance)

    return check


def modified_at_activations(rule: str) -> Check:
    """Check against the rule on autograd's graph; the note has the cosine between map and plain gradient."""

    def check(sight: Sight, ask: Ask) -> Figure:
        found = ask(sight).map
        cosine = float(torch.cosine_similarity(found.flatten().double(), sight.plain.flatten(), 0))
        return Figure(deviation(found, sight.modified(rule)), EXACT, f"cos ∇ {cosine:.2f}")

    return check


def by_patterns(way: str) -> Check:
    """Check against patterns fitted and applied on autograd's graph; a product of two tensors must be refused."""

    def check(sight: Sight, ask: Ask) -> Figure:
        window = sight.window_cotangents()[0][:1]
        if Patterned(sight.network, sight.case_output).call(window).products:
            try:
                ask(sight)
            except RuleError as refusal:
                raise NotApplicable(str(refusal)) from refusal
            return Figure(float("inf"), EXACT, "answered on a network with products")
        return Figure(deviation(ask(sight).map, sight.signal(way)), EXACT)

    return check


def complete(
    tolerance: float = COMPLETE,
    change: Callable[[Sight], float] | None = None,
    *,
    single: bool = False,
    **parameters: Any,
) -> Check:
    """Check Σ map = F(x) − F(x₀), F by the naive computation; on one window if ``single``."""

    def check(sight: Sight, ask: Ask) -> Figure:
        sight = sight.single if single else sight
        expected = sight.change if change is None else change(sight)
        total = float(ask(sight, **parameters).map.sum())
        gap = abs(total - expected) / abs(expected)
        if "n_steps" not in parameters:
            return Figure(gap, tolerance)
        return Figure(gap, tolerance, f"{most_steps(sight)} steps", capped=gap > tolerance)

    return check


def integrates(
    truth: Callable[[Sight], Tensor],
    few: Mapping[str, Any],
    enough: Mapping[str, Any],
    change: Callable[[Sight], float],
) -> Check:
    """Check the quadrature through the whole inferer with few steps, and completeness with enough (on one window)."""

    def check(sight: Sight, ask: Ask) -> Figure:
        equal = Figure(deviation(ask(sight, **few).map, truth(sight)), EXACT, "quadrature")
        if not equal.green:
            return equal
        one = sight.single
        expected, answer = change(one), ask(one, **{**few, **enough}, max_steps=most_steps(sight))
        gap = abs(float(answer.map.sum()) - expected) / abs(expected)
        steps = answer.notes.get("steps", enough.get("n_steps"))
        return Figure(gap, INTEGRATED, f"{steps} steps", capped=gap > INTEGRATED)

    return check


def conserves(expected: Callable[[Sight], float], *, positive: bool = False, absolute: bool = False) -> Check:
    """Check Σ map + absorbed relevance + padding = the total to be shared; the note has the share in the map."""

    def check(sight: Sight, ask: Ask) -> Figure:
        answer = ask(sight)
        there, total = expected(sight), float(answer.map.sum())
        kept = sum(float(answer.notes.get(n, 0.0)) for n in ("booked", "sum_in_padding"))
        scale = float(answer.map.abs().sum()) if absolute else abs(there)
        gap = abs(total + kept - there) / scale
        if positive and float(answer.map.min()) < 0:
            return Figure(float("inf"), COMPLETE, "negative values")
        if not bool(answer.map.any()):
            return Figure(float("inf"), COMPLETE, "nothing in the map")
        return Figure(gap, COMPLETE, f"{100 * total / there:.3g} % in the map")

    return check


def in_expectation(truth: Callable[[Sight], Tensor], few: Mapping[str, Any]) -> Check:
    """Check the naive sum with the same draws, and completeness within four standard errors of the record."""

    def check(sight: Sight, ask: Ask) -> Figure:
        equal = Figure(deviation(ask(sight, **few).map, truth(sight)), EXACT)
        if not equal.green:
            return equal
        answer = ask(sight, **{**few, "n_samples": 16})
        gap = abs(float(answer.map.sum()) - sight.change) / abs(sight.change)
        if "completeness_error" not in answer.notes:
            return equal
        error = float(answer.notes["completeness_error"])
        if gap > 4 * error + COMPLETE:
            return Figure(gap, 4 * error, f"± {error:.1g}")
        return Figure(equal.value, EXACT, f"gap {gap:.1g} ± {error:.1g}")

    return check


def both(*checks: Check) -> Check:
    """Combine checks that must all pass; the figure is that of the one closest to its tolerance."""

    def check(sight: Sight, ask: Ask) -> Figure:
        figures = [c(sight, ask) for c in checks]
        wrong = [f for f in figures if not f.green and not f.capped]
        return (wrong or sorted(figures, key=lambda f: -f.value / f.tolerance))[0]

    return check


def _of(parameters: Mapping[str, Any], sight: Sight) -> dict[str, Any]:
    """Replace parameters that are functions by their value for the case."""
    return {k: v(sight) if inspect.isfunction(v) else v for k, v in parameters.items()}


_HEAVY = ("UNETR", "SwinUNETR", "BasicUNet", "BasicUNetPlusPlus", "VNet")


def most_steps(sight: Sight) -> int:
    """The cap of integrated methods."""
    if sight.dims == 2:
        return 512
    return 64 if sight.name in _HEAVY else 256


# -- what is true: input methods ------------------------------------------------------------------------------------


def x0(sight: Sight) -> Tensor:
    return sight.x0


def noisy_gradients(sight: Sight) -> Tensor:
    return sight.once("noisy", lambda: torch.stack([sight.gradient(x) for x in sight.noisy(3, 0.15)]))


def straight_path(nodes: Mapping[float, float]) -> Callable[[Sight], Tensor]:
    """``(x − x₀) Σ w ∂F/∂x(x₀ + α (x − x₀))`` for nodes α with weights w."""

    def truth(sight: Sight) -> Tensor:
        dx = sight.image - sight.x0
        return sum((w * sight.gradient(sight.x0 + a * dx) for a, w in nodes.items()), torch.zeros_like(dx)) * dx

    return truth


MIDDLE = {0.25: 0.5, 0.75: 0.5}
TRAPEZOID = {0.0: 0.25, 0.5: 0.5, 1.0: 0.25}
SIGMA = 2.0


def scale_path(sight: Sight) -> Tensor:
    points = [gaussian_blur(sight.image, SIGMA), gaussian_blur(sight.image, SIGMA / 2), sight.image]
    g = [sight.gradient(p) for p in points]
    return sum((g[i] + g[i + 1]) / 2 * (points[i + 1] - points[i]) for i in (0, 1))


def scale_change(sight: Sight) -> float:
    return sight.value(sight.image) - sight.value(gaussian_blur(sight.image, SIGMA))


def draws(sight: Sight, n: int = 2) -> list[float]:
    """The places on the path that the run's seed draws."""
    generator = sight.s.objective.generator()
    return [float(torch.rand((), generator=generator, dtype=torch.float32)) for _ in range(n)]


def expected_gradients(sight: Sight) -> Tensor:
    return straight_path({a: 0.5 for a in draws(sight)})(sight)


def two_references(sight: Sight) -> list[Tensor]:
    return [sight.x0, (sight.x0 + sight.image.flip(-1)) / 2]


def mean_change(sight: Sight) -> float:
    values = [sight.value(r) for r in two_references(sight)]
    return sight.value(sight.image) - sum(values) / len(values)


def prior(sight: Sight) -> float:
    """What a class's mean shares out: weights that sum to 1."""
    return 1.0


def value(sight: Sight) -> float:
    return sight.value(sight.image)


def ranked_regions(sight: Sight) -> Tensor:
    attribution = 0
    for end in (sight.image.min(), sight.image.max()):
        dx = sight.image - end
        attribution = attribution + sum(sight.gradient(end + a * dx) for a in _GAUSS) * dx / 4
    regions = [Supervoxels(n, 0.1, mask="everything").of(sight.s.objective).labels[0].numpy() for n in _SIZES]
    return torch.from_numpy(naive_ranking(attribution.sum(0).numpy(), np.stack(regions)))[None]


_GAUSS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)
_SIZES = (4, 12)


def sides(sight: Sight, rule: Callable[..., Relevance], sign: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Apply a rule to the target and to its opposite, summed over windows: the network up to its last weights,
    explained for the relevance that arrives there, and the same with the signs of these weights changed.

    Args:
        sign: sign of the relevance that the opposite starts with.
    """
    name, head = _last_weights(sight)

    def to_head(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = head.register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
        sight.network(x)
        handle.remove()
        return kept[0]

    totals = [torch.zeros_like(sight.image), torch.zeros_like(sight.image)]
    windows, cotangents = sight.window_cotangents()
    for x, c, place in zip(windows, cotangents, sight.s.objective.plan.slices):
        arriving = rule(sight.case_output, x[None], c[None, None], layers={name: head}, **options)
        start = arriving.layers[name].gradient
        for side, factor in enumerate((1, sign)):
            with torch.no_grad():
                for p in head.parameters() if side else ():
                    p.neg_()
            totals[side][(slice(None), *place)] += rule(to_head, x[None], factor * start, **options).input[0, 0]
            with torch.no_grad():
                for p in head.parameters() if side else ():
                    p.neg_()
    return totals[0], totals[1]


def _last_weights(sight: Sight) -> tuple[str, torch.nn.Module]:
    """Return name and module of the convolution or linear layer that runs last."""
    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    ran: list[tuple[str, torch.nn.Module]] = []
    heads = [(n, m) for n, m in sight.network.named_modules() if isinstance(m, kinds)]
    handles = [m.register_forward_hook(lambda m, i, o, n=n: ran.append((n, m))) for n, m in heads]
    sight.value(sight.image)
    for handle in handles:
        handle.remove()
    return ran[-1]


def contrast_of_relevance(sight: Sight) -> Tensor:
    target, opposite = sides(sight, lrp, -1, composite={"convolution": "ZPlus", "dense": "ZPlus"})
    return target - opposite


def contrast_of_excitation(sight: Sight, ask: Ask) -> Figure:
    """Both sides as shares of what the last weights hand down."""
    if not sight.cuts([_last_weights(sight)[0]]):
        raise NotApplicable(
            "not measured: a path leads round the last weights, so turning their signs is not the whole opposite"
        )
    answer = ask(sight)
    target, opposite = sides(sight, excitation, 1)
    kept = [float(answer.notes[n]) for n in ("kept_target", "kept_opposite")]
    truth = sum(s / k for s, k in zip((target, -opposite), kept) if k)
    return Figure(deviation(answer.map, truth), EXACT)


# -- what is true: perturbations -------------------------------------------------------------------------------------


def quarters(sight: Sight) -> Tensor:
    """Number the quarters of the image by its last two axes, 1 to 4, (*spatial)."""
    labels = torch.ones(sight.image.shape[1:], dtype=torch.long)
    labels[..., labels.shape[-1] // 2 :] += 1
    labels[..., labels.shape[-2] // 2 :, :] += 2
    return labels


def donors(sight: Sight) -> list[Tensor]:
    return [sight.x0, sight.image.flip(-1)]


def exchanged_regions(sight: Sight) -> Tensor:
    """F(x) − mean over donors of F(x with the region of the donor), at the voxels of the region."""
    labels, result = quarters(sight), torch.zeros_like(sight.image[:1])
    for region in range(1, 5):
        inside = labels == region
        values = [sight.value(torch.where(inside, d, sight.image)) for d in donors(sight)]
        result[:, inside] = sight.value(sight.image) - sum(values) / len(values)
    return result


# -- what is true: class activation maps and layers -----------------------------------------------------------------


def _flat(values: Tensor) -> Tensor:
    return values.movedim(1, 0).flatten(1)


def grad_cam(sight: Sight) -> Tensor:
    return sight.s.blend(_flat(sight.at_image[1]).sum(1) / sight.positions)


def grad_cam_plus_plus(sight: Sight) -> Tensor:
    a, g = map(_flat, sight.at_image)
    alpha = g**2 / (2 * g**2 + g**3 * (a * sight.shares.flatten()).sum(1, keepdim=True))
    return sight.s.blend((alpha.nan_to_num() * g.relu()).sum(1))


def x_grad_cam(sight: Sight) -> Tensor:
    a, g = map(_flat, sight.at_image)
    return sight.s.blend(((a * g).sum(1) / (a * sight.shares.flatten()).sum(1)).nan_to_num())


def eigen_cam(sight: Sight) -> Tensor:
    a, share = _flat(sight.at_image[0]), sight.shares.flatten()
    direction = torch.linalg.svd(a * share.sqrt(), full_matrices=False).U[:, 0]
    return sight.s.blend(direction * torch.sign(direction @ (a * share).sum(1)))


def products(sight: Sight) -> Tensor:
    a, g = sight.at_image
    return sight.s.scatter((a * g).sum(1, keepdim=True))


def positive_products(sight: Sight) -> Tensor:
    a, g = sight.at_image
    return sight.s.scatter((a * g.relu()).sum(1, keepdim=True))


def pooled_products(sight: Sight) -> Tensor:
    """Products with gradients that have the largest value of blocks of two positions along each axis."""
    a, g = sight.at_image
    pooled = g.clone()
    for axis in range(2, g.ndim):
        pairs = [p.amax(axis, keepdim=True).expand_as(p) for p in pooled.split(2, axis)]
        pooled = torch.cat(pairs, axis)
    return sight.s.scatter((a * pooled).sum(1, keepdim=True))


def second_order(sight: Sight) -> Tensor:
    """Grad-CAM with ``g − ½ H A`` in place of g, by double backward through the inferer. A is 0 at class tokens."""
    module, kept = sight.network.get_submodule(sight.layer), []
    handle = module.register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
    score = sight.F(sight.image.clone().requires_grad_(True))
    handle.remove()
    gradients = torch.autograd.grad(score, kept, create_graph=True)
    curved = [g for g in gradients if g.requires_grad]
    products = [None] * len(kept)
    if curved:
        positions = math.prod(sight.s.roi) // 4 ** len(sight.s.roi)  # of tokens: those before them are no positions
        along = [a.detach().clone() for a in kept][: len(curved)]
        for a in along:
            if a.ndim == 3:
                a[:, : a.shape[1] - positions] = 0
        products = torch.autograd.grad(curved, kept, along, allow_unused=True)
    weights = [g.detach() if h is None else g.detach() - h / 2 for g, h in zip(gradients, products)]
    return sight.s.blend(_flat(sight.s.as_map(torch.cat(weights))).sum(1) / sight.positions)


def smoe_scale(sight: Sight) -> Tensor:
    """``μ log₂(μ / geometric mean)`` of the channels, interpolated and blended by MONAI's inferer."""
    roi = sight.s.roi

    def statistic(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = sight.network.get_submodule(sight.layer).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        sight.s.model(x)
        handle.remove()
        values = sight.s.as_map(kept[0]).relu() + 1e-7
        scale = values.mean(1) * (values.mean(1) / values.log().mean(1).exp()).log2()
        return torch.nn.functional.interpolate(scale[:, None], size=roi, mode=UP[len(roi)])

    with torch.no_grad():
        return sight.s.inferer(sight.image[None], statistic)[0]


def salient(sight: Sight, ask: Ask) -> Figure:
    """The saliency of LRP's relevance, by loops over patches."""
    answer = ask(sight)
    relevance = explain(methods.LRP(), sight.s.objective).maps[0].sum(0)
    scaled = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    count = round(float(answer.notes["patches"]))
    step = max(1.0, (scaled.numel() / _PATCHES) ** (1 / scaled.ndim))
    grid = tuple(max(1, int(n / step)) for n in scaled.shape)
    small = naive_saliency(scaled.numpy(), grid, [1.0], 6, 3.0, 0.8)
    truth = torch.nn.functional.interpolate(
        torch.from_numpy(small)[None, None], size=scaled.shape, mode=UP[scaled.ndim]
    )
    figure = Figure(deviation(answer.map, truth[0]), 1e-8)
    return figure if count == np.prod(grid) else Figure(float("inf"), 1e-8, "another number of patches")


_PATCHES = 64


def excitation_of_layer(sight: Sight) -> Tensor:
    """The layer's probabilities are what the network with the layer as a second input gives that input."""
    result = []
    windows, cotangents = sight.window_cotangents()
    outputs = torch.cat(sight.record(sight.image, sight.layer))
    for x, z, c in zip(windows, outputs, cotangents):
        rest, pair = tail(sight.network, sight.layer, x[None], z[None], sight.s.output)
        result.append(excitation(rest, pair, c[None, None]).input[0, :, x.numel() :].reshape(1, *z.shape))
    return sight.s.scatter(sight.s.as_map(torch.cat(result)).sum(1, keepdim=True))


def ablated_channels(sight: Sight, ask: Ask) -> Figure:
    """F with two channels of the layer at zero, through the inferer."""
    result, whole = ask(sight).map, sight.value(sight.image)
    values = sight.record(sight.image, sight.layer)
    tokens, wrong = values[0].ndim == 3, 0.0
    for c in (0, len(result) - 1):
        edited = [v.clone() for v in values]
        for v in edited:
            part = v[:, v.shape[1] - sight.at_image[0][0, 0].numel() :] if tokens else v  # a class token stays
            part.select(-1 if tokens else 1, c).zero_()
        with torch.no_grad():
            truth = whole - float(sight.replaced(sight.layer, edited))
        wrong = max(wrong, float((result[c] - truth).abs().max()) / abs(whole))
    return Figure(wrong, EXACT)


def exchanged_channels(sight: Sight, ask: Ask) -> Figure:
    """F with a channel of the layer from two other cases, through the inferer."""
    result, whole = ask(sight).map, sight.value(sight.image)
    values, truth = sight.record(sight.image, sight.layer), []
    tokens, c = values[0].ndim == 3, len(result) - 1
    for donor in donors(sight):
        edited = [v.clone() for v in values]
        for v, other in zip(edited, sight.record(donor, sight.layer)):
            start = v.shape[1] - sight.at_image[0][0, 0].numel() if tokens else 0
            axis = -1 if tokens else 1
            v[:, start:].select(axis, c).copy_(other[:, start:].select(axis, c))
        with torch.no_grad():
            truth.append(whole - float(sight.replaced(sight.layer, edited)))
    return Figure(float((result[c] - sum(truth) / 2).abs().max()) / abs(whole), EXACT)


def score_cam(sight: Sight) -> Tensor:
    maps = sight.s.blend(torch.eye(sight.at_image[0].shape[1], dtype=sight.image.dtype))
    values = []
    for m in maps:
        if float(m.max()) > float(m.min()):
            values.append(sight.value(sight.image * (m - m.min()) / (m.max() - m.min())))
    varied = [m for m in maps if float(m.max()) > float(m.min())]
    weights = torch.tensor(values, dtype=maps.dtype).softmax(0)
    return torch.einsum("c,c...->...", weights, torch.stack(varied))[None]


def ablation_cam(sight: Sight) -> Tensor:
    whole, weights = sight.value(sight.image), []
    values = sight.record(sight.image, sight.layer)
    tokens = values[0].ndim == 3
    constant = _flat(sight.at_image[0]).std(1) == 0
    for c in range(len(constant)):
        edited = [v.clone() for v in values]
        for v in edited:
            v.select(-1 if tokens else 1, c).zero_()
        with torch.no_grad():
            weights.append(0.0 if constant[c] else (whole - float(sight.replaced(sight.layer, edited))) / abs(whole))
    return sight.s.blend(torch.tensor(weights, dtype=sight.image.dtype))


def class_weights(sight: Sight, ask: Ask) -> Figure:
    """Plain CAM: its mean over the pooled layer plus the bias is the logit, and it is that layer under the weights."""
    case = sight.case
    if case.kind != CLASSIFICATION or sight.name == "ViT":
        raise NotApplicable("the network does not end as Σ w·mean(A) + b: there are no class weights of a pooled layer")
    sight = sight.wide
    answer = ask(sight)
    layer = str(answer.notes["layer"])
    head = [m for m in sight.network.modules() if isinstance(m, torch.nn.Linear)][-1]
    *_, pooled = sight.record(sight.image, layer)  # the last call: EfficientNet's activation is one module
    small = torch.einsum("c,nc...->n...", head.weight[sight.class_index].detach(), pooled)
    logit = float(small.mean() + head.bias[sight.class_index])
    logits = Figure(abs(logit - value(sight)) / abs(value(sight)), EXACT)
    truth = sight.upsampled(small)
    same = Figure(deviation(answer.map, truth), EXACT)
    return max(logits, same, key=lambda f: f.value)


def guided_grad_cam(sight: Sight) -> Tensor:
    return grad_cam(sight).relu() * sight.modified("guided")


def activations(sight: Sight) -> Tensor:
    channels = sight.at_image[0].shape[1]
    return sight.s.blend(torch.full((channels,), 1 / channels, dtype=sight.image.dtype))


def _along(sight: Sight, alpha: float) -> tuple[Tensor, Tensor]:
    return sight.once(("along", alpha), lambda: sight.at(sight.x0 + alpha * (sight.image - sight.x0)))


def conductance(sight: Sight) -> Tensor:
    steps = [_along(sight, j / 2) for j in range(3)]
    parts = [g * (b - a) for (a, g), (b, _) in itertools.pairwise(steps)]
    return sight.s.scatter(sum(parts).sum(1, keepdim=True))


def influence(sight: Sight) -> Tensor:
    return sight.s.scatter(sum(w * _along(sight, a)[1] for a, w in MIDDLE.items()).sum(1, keepdim=True))


def layer_path(sight: Sight) -> Tensor:
    end, start = sight.record(sight.image, sight.layer), sight.record(sight.x0, sight.layer)
    total = 0
    for alpha, weight in MIDDLE.items():
        leaves = [torch.lerp(a, b, alpha).requires_grad_() for a, b in zip(start, end)]
        gradients = torch.autograd.grad(sight.replaced(sight.layer, leaves), leaves)
        total = total + weight * torch.cat(gradients)
    change = sight.s.as_map(torch.cat(end)) - sight.s.as_map(torch.cat(start))
    return sight.s.scatter((sight.s.as_map(total) * change).sum(1, keepdim=True))


def layer_expected_gradients(sight: Sight) -> Tensor:
    change = _along(sight, 1.0)[0] - _along(sight, 0.0)[0]
    return sight.s.scatter(sum(_along(sight, a)[1] * change / 2 for a in draws(sight)).sum(1, keepdim=True))


def tail_relevance(sight: Sight) -> Tensor:
    """The layer's relevance is what the network with the layer as a second input gives that input."""
    found = []
    windows, cotangents = sight.window_cotangents()
    outputs = torch.cat(sight.record(sight.image, sight.layer))
    for x, z, c in zip(windows, outputs, cotangents):
        rest, pair = tail(sight.network, sight.layer, x[None], z[None], sight.s.output)
        relevance = lrp(rest, pair, c[None, None], "EpsilonPlus").input[0, :, x.numel() :]
        found.append(relevance.reshape(1, *z.shape))
    return sight.s.scatter(sight.s.as_map(torch.cat(found)).sum(1, keepdim=True))


def first_half(sight: Sight) -> list[int]:
    """The first half of the channels of the layer."""
    return list(range(max(1, sight.at_image[0].shape[1] // 2)))


def through_channels(sight: Sight) -> Tensor:
    """Relevance of the network up to the layer alone, for the multiplier that arrives at the first half of the layer's
    channels in the whole network."""
    name, total = sight.layer, torch.zeros_like(sight.image)
    layer = sight.network.get_submodule(name)

    def to_layer(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = layer.register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
        sight.network(x)
        handle.remove()
        return kept[0]

    windows, cotangents = sight.window_cotangents()
    for x, c, place in zip(windows, cotangents, sight.s.objective.plan.slices):
        arriving = lrp(sight.case_output, x[None], c[None, None], layers={name: layer}).layers[name].gradient
        masked = torch.zeros_like(arriving)
        axis = masked.ndim - 1 if masked.ndim == 4 else 2  # tokens (k, n, T, C)
        chosen = torch.tensor(first_half(sight))
        masked.index_copy_(axis, chosen, arriving.index_select(axis, chosen))
        total[(slice(None), *place)] += lrp(to_layer, x[None], masked).input[0, 0]
    return total


def layer_guided(sight: Sight) -> Tensor:
    """Guided backpropagation of ``Σ ĝ |A|``, through the inferer, on autograd's graph."""
    module = sight.network.get_submodule(sight.layer)

    def total(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
        sight.s.inferer(x[None], sight.s.model)
        handle.remove()
        return (sight.s.as_map(torch.cat(kept)).abs() * sight.shares[:, None]).sum()

    return modified_gradient(sight.network, total, sight.image, "guided")


def through_units(sight: Sight, one: bool = False) -> Tensor:
    """``(x − x₀) Σ w Σ_p ∂F/∂A_cp · ∂A_cp/∂x``: conductance of one of the layer's channels,
    or of one unit of it."""
    module, dx, total = sight.network.get_submodule(sight.layer), sight.image - sight.x0, 0
    for alpha, weight in MIDDLE.items():
        x = (sight.x0 + alpha * dx).clone().requires_grad_(True)
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o) or o.clone())
        score = sight.F(x)
        handle.remove()
        gradients = torch.autograd.grad(score, kept, retain_graph=True)
        chosen = []
        for values, gradient in zip(kept, gradients):
            leaf = torch.zeros_like(values).requires_grad_(True)
            units = sight.s.as_map(leaf)[:, sight.channel]
            if one:
                units = units[(0, *(i * p // n for i, p, n in zip(sight.unit, units.shape[1:], sight.case.roi)))]
            (at,) = torch.autograd.grad(units.sum(), leaf)
            chosen.append(gradient * at)
        total = total + weight * torch.autograd.grad(kept, x, chosen)[0]
    return total * dx


def attends(kind: str) -> Check:
    """Check against the matrices of all blocks; a network without self-attention must be refused."""

    def check(sight: Sight, ask: Ask) -> Figure:
        if not attention_blocks(sight.network):
            try:
                ask(sight)
            except MethodError as refusal:
                raise NotApplicable(str(refusal)) from refusal
            return Figure(float("inf"), EXACT, "answered on a network without self-attention")
        return Figure(deviation(ask(sight).map, attention_map(kind, sight)), EXACT)

    return check


# -- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        section: heading in the table.
        method: name in `esegeta_monai.methods`.
        check: what must hold.
        parameters: of the method, besides those of the check; functions are called with the sight.
        label: name of the row, if it is not that of the method.
        neuron: the target is a unit of an inner layer.
        letter: the kind of check.
    """

    section: str
    method: str
    check: Check
    letter: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    neuron: bool = False

    @property
    def name(self) -> str:
        return self.label or self.method

    def version(self, whose: str) -> str:
        """Hash the check (its source and its closure), and for our cells the method's file."""
        parts = [inspect.getsource(inspect.getmodule(getattr(methods, self.method)))] if whose == "ours" else []
        parts += _sources([self.check, *itertools.chain(*sorted(self.parameters.items()))], set())
        return sha256("".join(parts).encode()).hexdigest()[:8]


def _sources(part: Any, seen: set[int]) -> list[str]:
    """List the texts that identify a value: a function by its source and the values in its closure."""
    if isinstance(part, Mapping):
        return _sources([*itertools.chain(*part.items())], seen)
    if isinstance(part, (list, tuple)):
        return [text for each in part for text in _sources(each, seen)]
    if not inspect.isfunction(part):
        return [repr(part)]
    if id(part) in seen:
        return []
    seen.add(id(part))
    code = part.__code__
    if code.co_name == "<lambda>":  # its source would be the whole table
        constants = [c for c in code.co_consts if not inspect.iscode(c)]
        source = repr((code.co_names, code.co_freevars, constants))
    else:
        source = inspect.getsource(part)
    return [source, *_sources([c.cell_contents for c in part.__closure__ or ()], seen)]


GRADIENT, CAMS, LAYERS, NEURONS = "Gradient and relevance", "Class activation maps", "Layers", "Neurons"
PERTURBATION, ATTENTION = "Perturbation", "Attention"
_PATH = {"baseline": x0, "n_steps": 2, "method": "riemann_middle"}
_BISECTED = {"n_steps": 16, "tolerance": INTEGRATED}
_AT = {"layer": lambda s: s.layer}
_CUT = {"layer": lambda s: s.cut_layer, "baseline": x0}
_CASES = {"cases": lambda s: s.cases}
_RELU_OFF = {**_AT, "relu": False}


def _noise(name: str, reduce: Callable[[Tensor], Tensor]) -> Row:
    return Row(GRADIENT, name, equals(lambda s: reduce(noisy_gradients(s))), "G", {"n_samples": 3})


def _lrp(composite: str) -> Row:
    check = conserves(value, absolute=composite == "EpsilonAlpha2Beta1")
    return Row(GRADIENT, "LRP", check, "R", {"composite": composite}, f"LRP {composite}")


def _neuron(method: str, label: str, check: Check, letter: str, parameters: Mapping[str, Any] | None = None) -> Row:
    return Row(NEURONS, method, check, letter, parameters or {}, label, neuron=True)


ROWS: list[Row] = [
    Row(GRADIENT, "Saliency", equals(lambda s: s.plain.abs()), "G"),
    Row(GRADIENT, "VanillaBackprop", equals(lambda s: s.plain), "G"),
    Row(GRADIENT, "InputXGradient", equals(lambda s: s.plain * s.image), "G"),
    Row(
        GRADIENT,
        "IntegratedGradients",
        integrates(straight_path(MIDDLE), _PATH, {"tolerance": INTEGRATED}, lambda s: s.change),
        "G C",
    ),
    Row(GRADIENT, "BlurIG", integrates(scale_path, {"sigma": SIGMA, "n_steps": 2}, _BISECTED, scale_change), "G C"),
    Row(
        GRADIENT,
        "GuidedIG",
        integrates(
            straight_path(TRAPEZOID),
            {"baseline": x0, "n_steps": 2, "max_dist": 0.0},
            {**_BISECTED, "max_dist": 0.02},
            lambda s: s.change,
        ),
        "G C",
    ),
    Row(GRADIENT, "GuidedBackprop", modified_at_activations("guided"), "J"),
    Row(GRADIENT, "Deconvolution", modified_at_activations("deconvolution"), "J"),
    _noise("SmoothGrad", lambda g: g.mean(0)),
    _noise("SmoothGradSquared", lambda g: g.square().mean(0)),
    _noise("VarGrad", lambda g: g.var(0, correction=0)),
    Row(GRADIENT, "GradientShap", in_expectation(expected_gradients, {"baseline": x0, "n_samples": 2}), "G C"),
    Row(GRADIENT, "DeepLift", complete(baseline=x0), "C"),
    Row(GRADIENT, "DeepLiftShap", complete(change=mean_change, baseline=two_references), "C"),
    *(_lrp(composite) for composite in COMPOSITES),
    Row(GRADIENT, "SalientRelevance", salient, "N", {"max_patches": _PATCHES, "neighbours": 6, "sizes": (1.0,)}),
    Row(GRADIENT, "ConceptRelevance", equals(through_channels), "R", {**_AT, "channels": first_half}),
    Row(GRADIENT, "ExcitationBackprop", conserves(prior, positive=True), "R"),
    Row(GRADIENT, "ContrastiveLRP", equals(contrast_of_relevance), "N", {"positive": False}),
    Row(GRADIENT, "ContrastiveExcitationBackprop", contrast_of_excitation, "N", {"positive": False}),
    Row(GRADIENT, "LinearApproximation", equals(products), "N", _AT),
    Row(GRADIENT, "FullGrad", conserves(value), "C", {"abs": False}),
    Row(GRADIENT, "PatternNet", by_patterns("signal"), "J", _CASES),
    Row(GRADIENT, "PatternAttribution", by_patterns("attribution"), "J", _CASES),
    Row(GRADIENT, "XRAI", equals(ranked_regions), "N", {"n_segments": _SIZES, "n_steps": 2}),
    Row(
        PERTURBATION,
        "RegionTest",
        equals(exchanged_regions),
        "N",
        {"cases": donors, "feature_mask": quarters, "seam_control": False},
    ),
    Row(
        GRADIENT,
        "Captum",
        equals(straight_path(MIDDLE)),
        "G",
        {"baseline": x0, "arguments": {"n_steps": 2, "method": "riemann_middle"}},
        "Captum IntegratedGradients",
    ),
    Row(CAMS, "Cam", class_weights, "C"),
    Row(CAMS, "GradCam", equals(grad_cam), "N", _RELU_OFF),
    Row(CAMS, "GradCamPlusPlus", equals(grad_cam_plus_plus), "N", _RELU_OFF),
    Row(CAMS, "ScoreCam", equals(score_cam), "N", {**_RELU_OFF, "baseline": "zero"}),
    Row(CAMS, "GuidedGradCam", equals(guided_grad_cam), "J N", _AT),
    Row(CAMS, "HiResCam", equals(products), "N", _RELU_OFF),
    Row(CAMS, "LayerCam", equals(positive_products), "N", _RELU_OFF),
    Row(CAMS, "SegXResCam", equals(pooled_products), "N", _RELU_OFF),
    Row(CAMS, "ShapleyCam", equals(second_order, 1e-8), "N", _RELU_OFF),
    Row(CAMS, "SmoeScale", equals(smoe_scale), "N", _AT),
    Row(CAMS, "XGradCam", equals(x_grad_cam, 1e-8), "N", _RELU_OFF),
    Row(CAMS, "EigenCam", equals(eigen_cam, 1e-8), "N", _RELU_OFF),
    Row(CAMS, "AblationCam", equals(ablation_cam), "N", _RELU_OFF),
    *(Row(ATTENTION, name, attends(name), "N") for name in ("AttentionRollout", "AttentionRelevance", "LeGrad")),
    Row(LAYERS, "LayerActivation", equals(activations), "N", _AT),
    Row(
        LAYERS,
        "LayerConductance",
        both(
            equals(conductance, layer=lambda s: s.layer, baseline=x0, n_steps=2, rule="left"),
            complete(INTEGRATED, single=True, layer=lambda s: s.cut_layer, baseline=x0, n_steps=most_steps),
        ),
        "N C",
    ),
    Row(LAYERS, "InternalInfluence", equals(influence), "N", {**_AT, **_PATH}),
    Row(LAYERS, "LayerGradientXActivation", equals(products), "N", _AT),
    Row(LAYERS, "LayerIntegratedGradients", equals(layer_path), "N", {**_AT, **_PATH}),
    Row(LAYERS, "LayerDeepLift", complete(**_CUT), "C"),
    Row(LAYERS, "LayerDeepLiftShap", complete(change=mean_change, **{**_CUT, "baseline": two_references}), "C"),
    Row(LAYERS, "LayerGradientShap", equals(layer_expected_gradients), "N", {**_AT, "baseline": x0, "n_samples": 2}),
    Row(LAYERS, "LayerGradCam", equals(grad_cam), "N", _AT),
    Row(LAYERS, "LayerLRP", equals(tail_relevance), "R", _AT),
    Row(LAYERS, "LayerExcitationBackprop", equals(excitation_of_layer), "R", _AT),
    Row(LAYERS, "LayerFeatureAblation", ablated_channels, "N", {**_AT, "feature_mask": "channels"}),
    Row(
        LAYERS, "LayerFeaturePermutation", exchanged_channels, "N", {**_AT, "feature_mask": "channels", "cases": donors}
    ),
    Row(LAYERS, "LayerActivationGuidedBackprop", equals(layer_guided), "J", _AT),
    Row(NEURONS, "NeuronConductance", equals(through_units), "N", {**_AT, **_PATH, "channel": lambda s: s.channel}),
    _neuron("Saliency", "NeuronGradient", equals(lambda s: s.plain), "G", {"abs": False}),
    _neuron("IntegratedGradients", "NeuronIntegratedGradients", equals(straight_path(MIDDLE)), "G", _PATH),
    _neuron("DeepLift", "NeuronDeepLift", complete(), "C", {"baseline": x0}),
    _neuron("DeepLiftShap", "NeuronDeepLiftShap", complete(change=mean_change), "C", {"baseline": two_references}),
    _neuron("GradientShap", "NeuronGradientShap", equals(expected_gradients), "G", {"baseline": x0, "n_samples": 2}),
    _neuron("GuidedBackprop", "NeuronGuidedBackprop", modified_at_activations("guided"), "J"),
    _neuron("Deconvolution", "NeuronDeconvolution", modified_at_activations("deconvolution"), "J"),
]


_GATED = ("AttentionUnet", "UNETR", "SwinUNETR", "ViT", "ViTAutoEnc", "SEResNet50", "SENet154", "EfficientNet")

#: Cells that cannot be green, with the mathematical reason.
EXCEPTIONS: dict[tuple[str, str], str] = {
    **{
        ("FullGrad", network): "a gate or attention multiplies two functions of the input, y = u(x) v(x), whose part "
        "y − J x belongs to the product and to the bias of no module, so Σ x·∇ + Σ b·∇ ≠ F (the record states the gap)"
        for network in _GATED
    },
    (
        "FullGrad",
        "SoftmaxInside",
    ): "softmax ends the network as a function, not as a module, so its part y − J z is the bias of no module",
}


# -- measuring ------------------------------------------------------------------------------------------------------


def ours(row: Row) -> Ask:
    """Return the function that computes the maps of our method."""

    def ask(sight: Sight, **parameters: Any) -> Answer:
        method: Method = getattr(methods, row.method)(**_of({**row.parameters, **parameters}, sight))
        if row.neuron:
            explainer = Explainer(sight.network, sight.s.inferer, output=sight.s.output)
            (attribution,) = explainer(sight.image[None], [method], [sight.target])
            if attribution.map is None:
                raise MethodError(str(attribution.record.get("error", attribution.status)))
            return Answer(attribution.map.as_tensor(), attribution.record)
        explained = explain(method, sight.s.objective)
        return Answer(explained.maps[0], explained.note(0))

    return ask


def measure(row: Row, sight: Sight) -> Figure:
    """Measure one of our cells."""
    return row.check(sight, ours(row))
