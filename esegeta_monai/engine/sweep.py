"""A sweep: one pass over the windows that serves the requests of several methods.

Methods need the same few things of the whole image: activations, gradients of layers, the gradient at the input. So a
method does not loop over windows. Its `attribute` is a generator that yields a `Request` and gets the result back:

    weights = yield ChannelGradients(layer)               # (k, C), complete: all windows have been visited
    maps = yield BlendedActivations(layer, weights)       # (k, 1, *spatial)
    return Explained(maps)

The runner (`esegeta_monai.methods.run`) starts all methods, collects the request that each one has yielded, serves them
in one call of `sweep`, sends each method its result, and repeats until all have returned. A sweep computes the union of
what its requests need, with one forward pass per window and one backward pass per target. So several CAM methods
together cost as many passes as one. docs/requests.md has a complete example.

A request is an object with three steps: `begin` before the first window, `see` for each batch, and `result`, whose
return value becomes the value of the ``yield`` expression. It states in class attributes what it reads (`Request`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.batch import NO_PATH, Batch, Gradient
from esegeta_monai.engine.layer_frames import map_of_last_call, maps_of_calls
from esegeta_monai.engine.network.hooks import capture
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError
from esegeta_monai.utils.tensors import largest

__all__ = ["InputGradient", "Request", "View", "sweep"]


@dataclass
class View:
    """The data of one batch of windows that a `Request` can read.

    Attributes:
        batch: the windows.
        out: network output (n, R, *out_roi).
        activations: outputs of each layer (n, …) by name, one per call; see `maps`.
        gradients: ∂F/∂(output of the layer) (k, n, …), by name, one per call; absent if no target sees the windows or
            depends on the layer. See `gradient_maps`.
        input_gradient: ∂F/∂x (k, n, C, *roi) if some request reads it.
        seen: True if some target sees these windows (else this is a forward pass only).
    """

    batch: Batch
    out: Tensor
    activations: dict[str, list[Tensor]]
    gradients: dict[str, list[Tensor]]
    input_gradient: Tensor | None
    seen: bool
    objective: Objective

    def maps(self, layer: str, *, last: bool = False) -> list[Tensor]:
        """Return the activations of a layer in the frame of the window, one (n, C, *positions) per view of it.

        A layer that runs several times has several views, such as the window and its flip.

        Args:
            layer: dotted name.
            last: True: return those of the last call only.

        Raises:
            MethodError: the layer has no spatial map, or its calls are no views of the window.
        """
        if last:
            return [self.batch.unmirrored(map_of_last_call(self.activations[layer], self.objective, layer))]
        maps = maps_of_calls(self.activations[layer], self.objective, layer)
        self.objective.context.layer_positions[layer] = tuple(maps[0].shape[2:])
        return [self.batch.unmirrored(m) for m in maps]

    def gradient_maps(self, layer: str) -> list[Tensor]:
        """Return ``∂F/∂`` of each of `maps`, (k, n, C, *positions).

        Raises:
            MethodError: as `maps`, or the target does not depend on the layer.
        """
        if layer not in self.gradients:
            raise MethodError(f"the target does not depend on layer {layer!r} by a differentiable path: choose another")
        maps = maps_of_calls(self.gradients[layer], self.objective, layer, lead=2)
        return [self.batch.unmirrored(m) for m in maps]

    def of_call(self, views: int) -> slice:
        """Return the positions of this batch's views among those of all calls (members and mirrored views)."""
        number = self.objective.plan.call_number(self.batch.windows[0])
        return slice(number * views, (number + 1) * views)


class Request:
    """A quantity that a method collects in one sweep over the windows; requests of equal key are collected once.

    Attributes:
        layers: layers whose activations (and gradients) it reads.
        input_gradient: True: it reads the gradient at the input.
        backward: True: it reads gradients; else activations only.
        everywhere: True: it reads all windows, not only those that targets see (the others come without gradients).
        before_gradient: True: it reads activations and a gradient is requested next, so requests for gradients by
            other methods wait for that sweep.
        summed: names of attributes that add up over windows, tensors that are zero (or None) after `begin`: several
            processes sum them. None: each process looks at all windows.
    """

    layers: tuple[str, ...] = ()
    input_gradient: bool = False
    backward: bool = True
    everywhere: bool = False
    before_gradient: bool = False
    summed: tuple[str, ...] | None = None

    @property
    def key(self) -> Hashable:
        """Requests of equal key share their result."""
        return id(self)  # a dataclass has no hash of its own

    @property
    def parts(self) -> list[Any] | None:
        """Holders of the sums, see `esegeta_monai.utils.distributed.Summed`; None: each process looks at all
        windows."""
        return None if self.summed is None else [self]

    def begin(self, objective: Objective) -> None:
        """Prepare for the first window."""

    def see(self, view: View) -> None:
        """Collect from one batch of windows."""
        raise NotImplementedError

    def result(self) -> Any:
        """Return the result, after the last window."""
        raise NotImplementedError


class InputGradient(Request):
    """``∂F/∂x`` at the image, as a `Gradient` with m = 1."""

    input_gradient = True
    summed = ("maps", "padding", "values")

    @property
    def key(self) -> Hashable:
        return "input gradient"

    def begin(self, objective: Objective) -> None:
        self.objective = objective
        self.maps = objective.new_maps()
        self.padding = self.maps.new_zeros(self.maps.shape[:2])
        self.values = torch.zeros(objective.n_targets, dtype=torch.float64)

    def see(self, view: View) -> None:
        assert view.input_gradient is not None
        self.padding += self.objective.add(self.maps, view.batch, view.input_gradient)
        self.values += view.batch.scores(view.out).sum(1).cpu()

    def result(self) -> Gradient:
        objective = self.objective
        values = self.values + objective.constants() if objective.linear else objective.image_values().cpu()
        return Gradient(self.maps[:, None], values[:, None], self.padding[:, None])


def sweep(objective: Objective, requests: Sequence[Request]) -> list[Any]:
    """Serve all requests in one pass over the windows: shared forward passes, one backward pass per target.

    The first sweep of an objective also compares the blended windows with the given prediction
    (`Objective.blend_deviations`).

    Args:
        objective: the case.
        requests: requests of methods; those of equal key are collected once.

    Returns:
        The result of each request, in order.

    Raises:
        MethodError: a layer is not used, or there is no differentiable path to it.
    """
    unique = {r.key: r for r in requests}
    todo = list(unique.values())
    layers = sorted({name for r in todo for name in r.layers})
    for r in todo:
        r.begin(objective)
    backward, seen_windows = any(r.backward for r in todo), set(objective.windows)
    blended = None
    compared = objective.prediction is not None and not objective.first_windows
    deviations = objective.blend_deviations() if compared else []
    if None in deviations:
        blended = objective.new_predictions(1)

    def run(batch: Batch) -> None:
        seen = not seen_windows.isdisjoint(batch.windows)
        wanting = [r for r in todo if seen or r.everywhere]
        view = _view(objective, batch, layers, wanting, seen)
        if blended is not None and seen:
            objective.blend(blended, batch, view.out)
        for r in wanting:
            r.see(view)

    everywhere = any(r.everywhere for r in todo)
    jobs = [(0, w) for w in objective.all_windows] if everywhere else objective.jobs(1)
    parts = [r.parts for r in todo]
    sums = [*(blended or []), *(holder for p in parts for holder in p or [])]
    shared = None if None in parts else sums  # None: a request does not state what it adds into
    objective.each(jobs, run, with_cotangents=backward, split_seen=everywhere, sums=shared)
    if blended is not None:
        _note_deviations(objective, blended, deviations)
    return [unique[r.key].result() for r in requests]


def _view(objective: Objective, batch: Batch, layers: Sequence[str], wanting: Sequence[Request], seen: bool) -> View:
    """Run the network on a batch and gather what the requests read."""
    backward = seen and any(r.backward for r in wanting)
    x = batch.image
    wants_input = backward and any(r.input_gradient for r in wanting)
    if wants_input:
        x = x.detach().requires_grad_(True)
    model = objective.model
    grad = torch.set_grad_enabled(backward)
    with grad, capture(model.network, layers, of_windows=False, leaves=True) as captured:
        out = batch.forward(x)
    for name in layers:
        if name not in captured:
            raise MethodError(f"layer {name!r} is not used in the forward pass: choose another")
        if model.inferer is not None and len(captured.each[name]) > 1:  # its windows are not known
            raise MethodError(
                f"layer {name!r} runs {len(captured.each[name])} times under {type(model.inferer).__name__}, "
                "whose windows are not known: use SlidingWindowInferer, or an input method"
            )
    gradients: dict[str, list[Tensor]] = {}
    at_input = None
    if backward:
        with_grad = [n for r in wanting if r.backward for n in r.layers]
        calls = [(n, v) for n in dict.fromkeys(with_grad) for v in captured.each[n]]
        tracked = [v for _, v in calls if v.requires_grad]
        products: list[Tensor | None] = []
        if tracked or wants_input:
            products = batch.gradients(out, tracked + ([x] if wants_input else []))
        by_output = {id(v): g for v, g in zip(tracked, products) if g is not None}
        k = len(batch.cotangents)
        for n, v in calls:
            if any(id(other) in by_output for other in captured.each[n]):  # a call that the target ignores has zeros
                g = by_output.get(id(v))
                gradients.setdefault(n, []).append(v.new_zeros(k, *v.shape) if g is None else g)
        at_input = products[-1] if wants_input else None
        if wants_input and at_input is None:
            raise MethodError(NO_PATH)
    activations = {n: [v.detach() for v in captured.each[n]] for n in layers}
    return View(batch, out.detach(), activations, gradients, at_input, seen, objective)


def _note_deviations(objective: Objective, blended: Sequence[Tensor], deviations: list[float | None]) -> None:
    """Compare the blended windows (1, channels, *box) of each score with the given prediction."""
    assert objective.prediction is not None
    for k, (score, ours) in enumerate(zip(objective.scores, blended)):
        if score.empty:
            continue
        given = score.crop(objective.prediction)
        off = ours[0].sub_(given).mul_(score.mask.to(ours.device))  # in place: these are whole volumes
        deviations[k] = largest(off) / max(largest(given), torch.finfo(ours.dtype).tiny)
