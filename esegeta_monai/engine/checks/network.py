"""Checks of a network: independent rows, determinism, the derivative, an input that is only read.

They run once per network and weights, on one small window (`small_sample`), with at most 40 passes in all.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import weakref
from collections.abc import Hashable, Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from esegeta_monai.engine.checks.base import CheckResult, NetworkCheck, Sample, short_text, small_sample
from esegeta_monai.engine.checks.derivative import Derivative
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import evaluating, weights_hash
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.utils.tensors import copied

__all__ = ["NETWORK_CHECKS", "Determinism", "InputUnchanged", "Rows", "check_network_once"]

RANDOM = ("torch's random state", "the GPU's random state", "numpy's random state", "Python's random state")


class InputUnchanged(NetworkCheck):
    """The network does not write into its input. Where it does, it gets copies, which it always does here."""

    name: ClassVar[str] = "input"
    assumption: ClassVar[str] = "the network does not write into its input"

    def measure(self, sample: Sample, known: dict[str, CheckResult]) -> CheckResult:
        x = sample.window.clone()
        model = copy.copy(sample.model)
        model.copies_input = False
        model.args, model.kwargs = copied(model.args), copied(model.kwargs)
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
                first, *rest = (sample.run(torch.cat([x, other])) for other in [x, *others])
        except Exception as error:  # whatever a network raises for a batch of two
            text = f"the network does not accept two windows in a batch ({short_text(error)}), so it gets one per pass"
            return CheckResult(self.name, "handled", text, passes=sample.passes - start)
        if first.ndim == 0 or len(first) != 2:
            text = f"the network gives {tuple(first.shape)} for two windows, so it gets one per pass"
            return CheckResult(self.name, "handled", text, passes=sample.passes - start)
        change, repeat = max(_relative(first[:1], out[:1]) for out in rest), 0.0
        if change > 0:
            with torch.no_grad():
                repeat = _relative(first[:1], sample.run(torch.cat([x, x]))[:1])
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
            sample.run(sample.window)  # kernels may be chosen in the first pass, so no check looks at it
    except Exception as error:  # the network runs inside its inferer only; other errors appear in the prediction
        text = f"not checked: the network does not run on {tuple(sample.window.shape)} by itself ({short_text(error)})"
        return [CheckResult(check.name, "not checked", text) for check in NETWORK_CHECKS]
    known: dict[str, CheckResult] = {}
    for check in NETWORK_CHECKS:
        try:
            known[check.name] = check.measure(sample, known)
        except Exception as error:  # a network may fail in ways that only some methods meet; they name them
            known[check.name] = CheckResult(
                check.name, "not checked", f"not checked: the network fails ({short_text(error)})"
            )
    return list(known.values())


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
