"""Checks of a network: independent rows, determinism, the derivative, an input that is only read.

They run once per network and weights, on one small window (`small_sample`), with at most 40 passes in all.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import random
import weakref
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esegeta_monai.engine.checks.base import CheckResult, NetworkCheck, Sample, small_sample
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import evaluating, weights_hash
from esegeta_monai.engine.windows.plan import WindowPlan

__all__ = ["NETWORK_CHECKS", "Derivative", "Determinism", "InputUnchanged", "Rows", "check_network_once"]

RANDOM = ("torch's random state", "the GPU's random state", "numpy's random state", "Python's random state")


class InputUnchanged(NetworkCheck):
    """The network does not write into its input. Where it does, it gets copies, which it always does here."""

    name: ClassVar[str] = "input"
    assumption: ClassVar[str] = "the network does not write into its input"

    def measure(self, sample: Sample, known: dict[str, CheckResult]) -> CheckResult:
        x = sample.window.clone()
        model = copy.copy(sample.model)
        model.copies_input = False
        model.args = tuple(v.clone() if isinstance(v, Tensor) else v for v in model.args)
        model.kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in model.kwargs.items()}
        with torch.no_grad():
            sample.of(model, x.dtype).run(x)
        after = [x, *model.args, *model.kwargs.values()]
        given = [sample.window, *sample.model.args, *sample.model.kwargs.values()]
        if all(torch.equal(a, b) for a, b in zip(after, given) if isinstance(a, Tensor)):
            return CheckResult(self.name, "passed", "the network leaves its input unchanged", passes=1)
        return CheckResult(self.name, "handled", "the network writes into its input, so it gets copies", passes=1)


class Determinism(NetworkCheck):
    """Equal passes agree: the network draws no random numbers and keeps no state that changes its output.

    The window is compared with itself in two passes, and with the pass of a copy of the network that saw another window
    first. ``value`` is the largest difference of outputs or gradients, relative to the largest value.
    """

    name: ClassVar[str] = "determinism"
    assumption: ClassVar[str] = "two equal passes give the same output and gradient"

    def measure(self, sample: Sample, known: dict[str, CheckResult]) -> CheckResult:
        start = sample.passes
        with torch.no_grad():
            sample.run(sample.window)  # kernels may be chosen in the first pass
        before = _state(sample.model.network)
        first = _output_and_gradient(sample)
        changed = [name for name, value in _state(sample.model.network).items() if before.get(name) != value]
        second = _output_and_gradient(sample)
        noise, passes = _difference(first, second), sample.passes - start
        limit = 100 * torch.finfo(first[0].dtype).eps
        cause = f" ({_listed(changed)} changed in the pass)" if changed else ""
        if noise > limit:
            text = (
                f"two equal passes of the network differ by {100 * noise:.2g} % of the largest value{cause}: the map "
                "explains a score with this noise; 'noise' states it in units of the target"
            )
            return CheckResult(self.name, "warned", text, noise, passes=passes)
        if any(name in changed for name in RANDOM):
            text = (
                f"the network draws random numbers{cause}; two equal passes agree, but others may not: the map may "
                "explain a score with noise"
            )
            return CheckResult(self.name, "warned", text, noise, passes=passes)
        memory, more = self._memory(sample, first)
        if memory > limit:
            text = (
                "the network keeps state between passes: after another image, its result of the same window differs by "
                f"{100 * memory:.2g} % of the largest value, so the map depends on the images that the network has "
                "seen before"
            )
            return CheckResult(self.name, "warned", text, memory, passes=passes + more)
        text = "two equal passes agree" + (
            "" if more else "; whether the network remembers other images is not checked"
        )
        return CheckResult(self.name, "passed", text, noise, passes=passes + more)

    @staticmethod
    def _memory(sample: Sample, expected: list[Tensor]) -> tuple[float, int]:
        """Return the difference that another window before this one makes, and the number of passes; 0: no copy."""
        if sample.unused is None:
            return 0.0, 0
        model, x = copy.copy(sample.model), sample.window
        model.network, sample.unused = sample.unused, None
        other = sample.of(model, x.dtype)
        with torch.no_grad():  # another content and mean within the range of the values, or another constant
            other.run(x + 1 if bool((x == x.flatten()[0]).all()) else x.flip(-1).clamp(min=float(x.mean())))
        return _difference(expected, _output_and_gradient(other)), other.passes


class Rows(NetworkCheck):
    """Rows of a batch do not influence each other: row 0 stays as it is while the other row is exchanged.

    ``value`` is the largest change of row 0 relative to its largest value; infinite if a gradient of row 0 reaches
    the other row only. Where rows mix, windows run one by one.
    """

    name: ClassVar[str] = "rows"
    assumption: ClassVar[str] = "the images of a batch do not influence each other"

    def measure(self, sample: Sample, known: dict[str, CheckResult]) -> CheckResult:
        start, x = sample.passes, sample.window
        others = [torch.zeros_like(x), 100 * sample.scale * sample.noise(2), x.flip(-1) + sample.scale]
        try:
            with torch.no_grad():
                first, again, *rest = (sample.run(torch.cat([x, other])) for other in [x, x, *others])
        except Exception as error:  # whatever a network raises for a batch of two
            text = f"the network does not accept two windows in a batch ({_short(error)}), so it gets one per pass"
            return CheckResult(self.name, "handled", text, passes=sample.passes - start)
        if first.ndim == 0 or len(first) != 2:
            text = f"the network gives {tuple(first.shape)} for two windows, so it gets one per pass"
            return CheckResult(self.name, "handled", text, passes=sample.passes - start)
        repeat = _relative(first[:1], again[:1])
        change = max(_relative(first[:1], out[:1]) for out in rest)
        reaches = self._gradient_reaches(sample, others[-1])
        passes = sample.passes - start
        if change <= 2 * repeat and not reaches:
            return CheckResult(self.name, "passed", "the rows of a batch are independent", change, passes=passes)
        effect = f"an output changes by {100 * change:.3g} %" if change > 2 * repeat else "its gradient reaches them"
        text = f"the network mixes the images of a batch ({effect} with the other images), so windows run one by one"
        return CheckResult(self.name, "handled", text, change, passes=passes)

    @staticmethod
    def _gradient_reaches(sample: Sample, other: Tensor) -> bool:
        x = torch.cat([sample.window, other]).requires_grad_(True)
        with torch.enable_grad():
            out = sample.run(x)
            if not out.requires_grad:
                return False
            score = (out * sample.cotangent(out))[0].sum()
            (gradient,) = _gradients(score, x)
        # 0 times an infinite derivative, as after an overflow in half precision, is NaN and shows nothing
        return gradient is not None and bool(gradient[1:].nan_to_num(0.0, 0.0, 0.0).any())


class Derivative(NetworkCheck):
    """The backward pass is the derivative: it agrees with central differences in float64.

    ``value`` is ``√Σ (d − g·v)² / √Σ d²`` over 8 white directions v and that of the gradient g, where d is the central
    difference with a step of 1e-7 standard deviations at a window with a little noise, which avoids ties (of max
    pooling, on a constant background). Correct networks stay below 0.01; between 0.01 and 0.05, 32 directions decide.
    A deviation that the rounding of the output explains decides nothing.
    """

    name: ClassVar[str] = "derivative"
    assumption: ClassVar[str] = "the backward pass computes the derivative of the forward pass"
    directions: ClassVar[int] = 8
    more_directions: ClassVar[int] = 32
    wrong: ClassVar[float] = 0.05
    right: ClassVar[float] = 0.01

    def measure(self, sample: Sample, known: dict[str, CheckResult]) -> CheckResult:
        if "determinism" in known and known["determinism"].verdict != "passed":
            return self._unchecked("the network's output is not the same in equal passes")
        try:
            with torch.no_grad():
                sample.run(sample.window)  # a network that keeps tensors with a graph could not be copied
            double = _in_float64(sample)
            point = double.window + 0.03 * double.scale * double.noise(3)
            with _Operations() as operations, torch.enable_grad():
                leaf = point.clone().requires_grad_(True)
                out = double.run(leaf)
        except Exception as error:  # a copy in float64 may fail in any way
            return self._unchecked(f"the network does not run in float64 ({_short(error)})")
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
            return self._unchecked(f"the backward pass fails ({_short(error)})", double.passes)
        gradient = torch.zeros_like(point) if gradient is None else gradient
        value, largest = self._deviation(double, point, gradient, cotangent, range(self.directions))
        if value is not None and self.right <= value <= self.wrong:
            every = range(self.directions + self.more_directions)
            value, largest = self._deviation(double, point, gradient, cotangent, every)
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
        self, sample: Sample, point: Tensor, gradient: Tensor, cotangent: Tensor, seeds: range
    ) -> tuple[float | None, float]:
        """Return the relative deviation of central differences from a gradient, None if both are zero, and the largest
        deviation in units of the score per unit of x."""
        step = self._step(sample)
        whites = [sample.noise(100 + seed) for seed in seeds]
        norm = gradient.norm()
        directions = [*whites, gradient / norm] if norm > 0 else whites
        misses, sizes, largest = 0.0, 0.0, 0.0
        for v in directions:
            with torch.no_grad():
                up, down = (((sample.run(point + s * step * v)) * cotangent).sum() for s in (1, -1))
            difference = float(up - down) / (2 * step)
            expected = float((gradient * v).sum())
            misses += (difference - expected) ** 2
            sizes += difference**2
            largest = max(largest, abs(difference - expected))
        if sizes == 0:
            return (None if misses == 0 else float("inf")), largest
        return float((misses / sizes) ** 0.5), largest

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


NETWORK_CHECKS: tuple[NetworkCheck, ...] = (InputUnchanged(), Determinism(), Rows(), Derivative())
"""The checks in the order in which they run."""

_DONE: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, list[CheckResult]]] = weakref.WeakKeyDictionary()


def check_network_once(
    model: Model, image: Tensor, plan: WindowPlan, *, condition: Tensor | None = None, ignore_weights: bool = False
) -> list[CheckResult]:
    """Check a network, or return the results of the earlier check of the same network, weights, window and precision.

    Args:
        model: the network.
        image: (C, *spatial), from which a small window is cut.
        plan: the windows of the image.
        condition: MONAI's ``condition`` volume (C, *spatial), or None.
        ignore_weights: results of the same network with other weights count too, as during a training.

    Example:
        >>> from esegeta_monai.engine.windows.inferers import plan_windows
        >>> model = Model(nn.Conv2d(1, 2, 3), torch.device("cpu"))
        >>> image = torch.rand(1, 8, 8)
        >>> [f"{r.name}: {r.verdict}" for r in check_network_once(model, image, plan_windows(None, (8, 8)))]
        ['input: passed', 'determinism: passed', 'rows: passed', 'derivative: passed']
    """
    done = _DONE.setdefault(model.network, {})
    weights = None if ignore_weights else weights_hash(model.network)
    key = (weights, str(model.device), str(model.autocast_dtype), plan.roi, str(model.output), model.inferer is None)
    if key not in done:
        with _random_states(model.device), evaluating(model.network, model.device):
            unused = _copied(model.network)
            sample = small_sample(model, image, plan, condition)
            sample.unused = unused
            results = _measured(sample)
        if all(result.verdict == "not checked" for result in results):  # the next image may run: too little memory
            return results
        done[key] = results
    return done[key]


def _copied(network: nn.Module) -> nn.Module | None:
    """Return a copy of a network before its first pass; None: it cannot be copied (it holds a tensor with a graph)."""
    try:
        return copy.deepcopy(network)
    except Exception:  # a copy may fail in any way
        return None


def _measured(sample: Sample) -> list[CheckResult]:
    try:
        with torch.no_grad():
            sample.run(sample.window)
    except Exception as error:  # the network runs inside its inferer only; other errors appear in the prediction
        text = f"not checked: the network does not run on {tuple(sample.window.shape)} by itself ({_short(error)})"
        return [CheckResult(check.name, "not checked", text) for check in NETWORK_CHECKS]
    known: dict[str, CheckResult] = {}
    for check in NETWORK_CHECKS:
        try:
            known[check.name] = check.measure(sample, known)
        except Exception as error:  # a network may fail in ways that only some methods meet; they name them
            known[check.name] = CheckResult(
                check.name, "not checked", f"not checked: the network fails ({_short(error)})"
            )
    return list(known.values())


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


def _in_float64(sample: Sample) -> Sample:
    """Return the sample with a copy of the network in float64."""
    return sample.of(sample.model.in_float64(), torch.float64)


def _output_and_gradient(sample: Sample) -> list[Tensor]:
    """Return the output of the network and, if it has a backward pass, the gradient at the window."""
    x = sample.window.clone().requires_grad_(True)
    with torch.enable_grad():
        out = sample.run(x)
    if not out.requires_grad:
        return [out]
    try:
        (gradient,) = _gradients((out * sample.cotangent(out)).sum(), x)
    except RuntimeError:  # an operation without derivative; methods that need one name it
        gradient = None
    return [out.detach()] if gradient is None else [out.detach(), gradient]


def _difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest relative difference of two results of `_output_and_gradient`."""
    if len(first) != len(second):
        return float("inf")
    return max(_relative(a, b) for a, b in zip(first, second))


def _gradients(score: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(score, x, allow_unused=True)


def _relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference relative to the largest finite value; infinite where only one is finite."""
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    finite = torch.isfinite(a)
    largest = float(a[finite].abs().max()) if bool(finite.any()) else 0.0
    difference = float((a[finite] - b[finite]).abs().max()) if bool(finite.any()) else 0.0
    return 0.0 if difference == 0 else difference / max(largest, torch.finfo(a.dtype).tiny)


def _state(network: nn.Module) -> dict[str, str]:
    """Return hashes of torch's, numpy's and Python's random states and of the network's buffers, by name."""
    state = {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "numpy's random state": repr(np.random.get_state()).encode(),
        "Python's random state": repr(random.getstate()).encode(),
    }
    if torch.cuda.is_available():
        state["the GPU's random state"] = torch.cuda.get_rng_state().numpy().tobytes()
    for name, buffer in network.named_buffers():
        state[f"buffer {name}"] = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {name: hashlib.sha256(value).hexdigest() for name, value in state.items()}


@contextlib.contextmanager
def _random_states(device: torch.device) -> Iterator[None]:
    """Restore torch's, numpy's and Python's random states after the block: checks do not change a training."""
    own, numbers = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numbers)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
