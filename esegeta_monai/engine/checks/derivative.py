"""The check that the backward pass of a network is the derivative of its forward pass."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from esegeta_monai.engine.checks.base import CheckResult, NetworkCheck, Sample, short_text

__all__ = ["Derivative"]


class Derivative(NetworkCheck):
    """The backward pass is the derivative: it agrees with central differences in float64.

    ``value`` is ``√Σ (d − g·v)² / √Σ d²`` over 8 white directions v and that of the gradient g, where d is the central
    difference with a step of 1e-7 standard deviations at a window with a little noise, which avoids ties (of max
    pooling, on a constant background). Correct networks stay below 0.01; between 0.01 and 0.05, 32 directions decide.
    A deviation that the rounding of the output explains decides nothing.

    If g and the first 3 white directions give less than 0.001, the others are left out. With a true deviation of 0.05,
    the white ones give that with a probability of 1.4e-5 (F distribution with 3 and 3 degrees of freedom).
    """

    name: ClassVar[str] = "derivative"
    assumption: ClassVar[str] = "the backward pass computes the derivative of the forward pass"
    first_directions: ClassVar[int] = 3
    directions: ClassVar[int] = 8
    more_directions: ClassVar[int] = 32
    wrong: ClassVar[float] = 0.05
    right: ClassVar[float] = 0.01
    clear: ClassVar[float] = 0.001

    def measure(self, sample: Sample, known: dict[str, CheckResult]) -> CheckResult:
        if "determinism" in known and known["determinism"].verdict != "passed":
            return self._unchecked("the network's output is not the same in equal passes")
        try:
            double = self._in_float64(sample)
            point = double.window + 0.03 * double.scale * double.noise(3)
            with _Operations() as operations, torch.enable_grad():
                leaf = point.clone().requires_grad_(True)
                out = double.run(leaf)
        except Exception as error:  # a copy in float64 may fail in any way
            return self._unchecked(f"the network does not run in float64 ({short_text(error)})")
        if operations.lower or out.dtype != torch.float64:
            return self._unchecked("the network computes in float32 inside, whatever its input")
        if not out.requires_grad:
            return self._unchecked("the network has no backward pass")
        cotangent = double.cotangent(out)
        terms = out * cotangent
        score = terms.sum()
        try:
            (gradient,) = torch.autograd.grad(score, leaf, allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            return self._unchecked(f"the backward pass fails ({short_text(error)})", double.passes)
        gradient = torch.zeros_like(point) if gradient is None else gradient
        value, largest = self._deviation(double, point, gradient, cotangent)
        if value is not None and math.isnan(value):
            return self._unchecked("the output or its gradient is NaN or infinite at this window", double.passes)
        if value is not None and value > self.wrong:
            rounding = self._rounding(score, terms, operations.results) / self._step(double)
            if largest <= rounding:
                return self._unchecked("the output is flat here: it changes by its rounding only", double.passes)
        if value is None:
            return self._unchecked("the output does not change with the image at this window", double.passes)
        if value <= self.wrong:
            return CheckResult(
                self.name, "passed", "the backward pass agrees with central differences", value, passes=double.passes
            )
        text = (
            f"the network's backward pass is not the derivative of its forward pass (central differences deviate by "
            f"{100 * value:.2g} %): a part is detached, reversed, rounded or runs under no_grad. Maps that use "
            "gradients show what the backward pass computes; perturbation methods such as Occlusion need no gradient"
        )
        return CheckResult(self.name, "warned", text, value, "gradient", double.passes)

    def _deviation(
        self, sample: Sample, point: Tensor, gradient: Tensor, cotangent: Tensor
    ) -> tuple[float | None, float]:
        """Return the relative deviation of central differences from a gradient, None if both are zero, and the largest
        deviation in units of the score per unit of x."""
        step, norm = self._step(sample), gradient.norm()
        misses, sizes, largest = 0.0, 0.0, 0.0

        def add(v: Tensor) -> float | None:
            nonlocal misses, sizes, largest
            with torch.no_grad():
                up, down = (((sample.run(point + s * step * v)) * cotangent).sum() for s in (1, -1))
            difference = float(up - down) / (2 * step)
            miss = abs(difference - float((gradient * v).sum()))
            misses, sizes, largest = misses + miss**2, sizes + difference**2, max(largest, miss)
            return float((misses / sizes) ** 0.5) if sizes else None if misses == 0 else float("inf")

        value = add(gradient / norm) if norm > 0 else None
        for seed in range(self.directions + self.more_directions):
            clear = seed == self.first_directions and value is not None and value < self.clear
            decided = seed == self.directions and (value is None or not self.right <= value <= self.wrong)
            if clear or decided:
                break
            value = add(sample.noise(100 + seed))
        return value, largest

    @staticmethod
    def _in_float64(sample: Sample) -> Sample:
        """Return the sample with a copy of the network in float64."""
        try:
            return sample.of(sample.model.in_float64(), torch.float64)
        except RuntimeError:  # a network that keeps tensors with a graph cannot be copied
            with torch.no_grad():
                sample.run(sample.window)
            return sample.of(sample.model.in_float64(), torch.float64)

    @staticmethod
    def _step(sample: Sample) -> float:
        return 1e-7 * sample.scale

    @staticmethod
    def _rounding(score: Tensor, terms: Tensor, results: list[Tensor]) -> float:
        """Return a first-order bound of the rounding error of a score in float64.

        Each operation rounds each of its results a by a relative error of u = 2⁻⁵³ at least, which changes the score F
        by u |a ∂F/∂a|; pairwise summation of n terms adds ⌈log₂ n⌉ u of the sum of their magnitudes. The error of a
        central difference with step h is twice the sum, divided by 2 h.

        Args:
            score: F, with its graph.
            terms: the terms of F (1, K, …).
            results: of the operations of the network, of any shape.
        """
        u, total = 2.0**-53, float(terms.detach().abs().sum()) * math.ceil(math.log2(terms.numel()) + 1)
        try:
            gradients = torch.autograd.grad(score, results, allow_unused=True)
        except RuntimeError:  # results inside torch.func transforms are gone; what remains is still a part of the error
            return u * total
        return u * (
            total + sum(float((g * a.detach()).abs().sum()) for g, a in zip(gradients, results) if g is not None)
        )

    def _unchecked(self, why: str, passes: int = 0) -> CheckResult:
        return CheckResult(self.name, "not checked", f"not checked: {why}", passes=passes)


class _Operations(TorchFunctionMode):
    """Collect the results of all operations on the path from the image; ``lower``: one has a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = False
        self.results: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.requires_grad:
            self.lower |= out.dtype != torch.float64
            self.results.append(out)
        return out
