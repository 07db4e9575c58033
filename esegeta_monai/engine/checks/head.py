"""The check of a network's head: its last operations, and the range of its output on three inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from esegeta_monai.engine.checks.base import CheckResult, Sample
from esegeta_monai.engine.head import Head, HeadKind, Postprocessing
from esegeta_monai.engine.network.state import weights_hash
from esegeta_monai.errors import NetworkError, UsageError

__all__ = ["HeadEvidence", "evidence_of", "find_head", "may_be_inside"]

CLOSE = 1e-4
"""Tolerance of a sum of probabilities."""

_PASSES = frozenset(
    [
        "View",
        "UnsafeView",
        "Reshape",
        "ReshapeAlias",
        "Alias",
        "Slice",
        "Select",
        "Squeeze",
        "Unsqueeze",
        "Permute",
        "Transpose",
        "T",
        "Clone",
        "Expand",
        "Cat",
        "Stack",
        "Split",
        "SplitWithSizes",
        "Unbind",
        "Index",
        "IndexSelect",
        "ToCopy",
        "CopySlices",
        "CopyBackwards",
        "AsStrided",
        "Flip",
        "Roll",
        "Repeat",
        "Unfold",
        "Contiguous",
        "Narrow",
        "Detach",
        "SliceScatter",
        "SelectScatter",
        "UpsampleNearest1D",
        "UpsampleNearest2D",
        "UpsampleNearest3D",
        "UpsampleLinear1D",
        "UpsampleBilinear2D",
        "UpsampleTrilinear3D",
        "ConstantPadNd",
        "Gather",
    ]
)
"""Operations, as autograd names them, that move values, resize maps or join them."""

_AVERAGES = frozenset(
    [
        "Mean",
        "Add",
        "Sum",
        "Sub",
        "Rsub",
        "Neg",
        "Div",
        "Mul",
        "AvgPool2D",
        "AvgPool3D",
        "AdaptiveAvgPool2D",
        "AdaptiveAvgPool3D",
        "MkldnnAdaptiveAvgPool2D",
    ]
)
"""Arithmetic that may average several outputs."""

_PLAIN = frozenset(
    [
        "Convolution",
        "MkldnnConvolution",
        "CudnnConvolution",
        "Addmm",
        "Mm",
        "Bmm",
        "Baddbmm",
        "Addmv",
        "Mv",
        "Dot",
        "Linear",
        "NativeBatchNorm",
        "CudnnBatchNorm",
        "NativeLayerNorm",
        "NativeGroupNorm",
        "Relu",
        "Threshold",
        "LeakyRelu",
        "Prelu",
        "Clamp",
        "ClampMin",
        "ClampMax",
        "Hardtanh",
        "MaxPool2DWithIndices",
        "MaxPool3DWithIndices",
        "Amax",
        "Max",
        "AccumulateGrad",
    ]
)
"""Operations after which an output is a linear combination, or one that is cut off: no activation."""

_INSIDE: Final[dict[str, HeadKind]] = {
    "Softmax": "softmax inside",
    "LogSoftmax": "log-softmax inside",
    "Sigmoid": "sigmoid inside",
}


@dataclass(frozen=True)
class HeadEvidence:
    """The evidence of a network's last operations and of its range on three inputs.

    Attributes:
        kind: the kind that they show; None: none.
        certain: False if the output only looks like that of a sigmoid.
        text: why, one sentence.
        unusual: name of another activation function in which the network ends; None: none.
        failed: why the network could not be run for this; None: it could.
    """

    kind: HeadKind | None = None
    certain: bool = True
    text: str = ""
    unusual: str | None = None
    failed: str | None = None


def may_be_inside(prediction: Tensor) -> bool:
    """Return True if a prediction (K, …) may consist of probabilities or log-probabilities: all in [0, 1], or none
    positive."""
    low, high = float(prediction.min()), float(prediction.max())
    return (low >= -CLOSE and high <= 1 + CLOSE) or high <= CLOSE


def evidence_of(sample: Sample) -> HeadEvidence:
    """Look at a network's last operations, and at its output on a window, on ten times the window and on noise.

    It takes three passes, once per network, weights and output.

    Args:
        sample: network and window.
    """
    network = sample.model.network
    key = (weights_hash(network), str(sample.model.output), tuple(sample.window.shape))
    known = _KNOWN.setdefault(network, {})
    if key not in known:
        known.clear()
        known[key] = _measured(sample)
    return known[key]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[Any, HeadEvidence]] = weakref.WeakKeyDictionary()


def find_head(
    prediction: Tensor,
    stated: str | None,
    post: Postprocessing,
    evidence: Callable[[], HeadEvidence],
) -> tuple[Head, CheckResult]:
    """Decide what the output of a network is.

    Args:
        prediction: (K, *spatial), or (K,).
        stated: the kind that the user states; None: find out.
        post: what the bundle does with the output.
        evidence: returns what the network shows; called only if the range of the prediction leaves it open.

    Raises:
        UsageError: the prediction contradicts ``stated``.
        NetworkError: the postprocessing applies softmax or sigmoid to an output that is already its result.
    """
    low, high = float(prediction.min()), float(prediction.max())
    values = f"the output has values from {low:.4g} to {high:.4g}"
    if stated is not None:
        return _stated(stated, post, prediction, values)
    evident = evidence() if may_be_inside(prediction) else HeadEvidence()
    reads = _in_words(post)
    if evident.kind is not None and evident.certain:
        return _inside(evident, post, reads)
    if evident.kind is not None:
        agrees = post.activation is None and (
            post.argmax or post.declared == "probabilities" or any(0 < t < 1 for t in post.thresholds)
        )
        if agrees:
            second = reads or "metadata.json declares probabilities"
            text = f"probably a sigmoid inside the network: {evident.text}, and {second}; masks are probability > 0.5"
            return Head(evident.kind, False, (evident.text, second), post), CheckResult("head", "handled", text)
        kind: HeadKind = post.activation if post.activation in ("softmax", "sigmoid") else "unknown"
        assumed = f"{reads}, so the values are taken for raw output" if kind != "unknown" else "raw output is assumed"
        text = f"the values may already be probabilities: {evident.text}; {assumed}; {_ASK}"
        return Head(kind, False, (evident.text, assumed), post), CheckResult("head", "warned", text)
    head, result = _raw(evident, post, reads, values, len(prediction))
    if evident.failed is not None:
        text = f"{result.text}; the network's last operations are unknown: {evident.failed}; {_ASK}"
        result = CheckResult("head", "not checked" if result.verdict == "passed" else result.verdict, text)
        head = replace(head, certain=False)
    return head, result


_ASK = (
    "confirm by head='sigmoid inside', 'softmax inside', 'sigmoid' (raw output whose sigmoid is the "
    "probability), 'softmax' or 'raw' (--head on the command line)"
)


def _stated(stated: str, post: Postprocessing, prediction: Tensor, values: str) -> tuple[Head, CheckResult]:
    head = Head(stated, True, (f"head={stated!r} was given",), post)  # type: ignore[arg-type]
    low, high = float(prediction.min()), float(prediction.max())
    if (head.values == "probability" and not -CLOSE <= low <= high <= 1 + CLOSE) or (
        head.values == "log_probability" and high > CLOSE
    ):
        raise UsageError(f"head={stated!r}, but {values}: they are no {head.values.replace('_', '-')}")
    return head, CheckResult("head", "passed", f"{stated}, as given by head=")


def _inside(evident: HeadEvidence, post: Postprocessing, reads: str) -> tuple[Head, CheckResult]:
    assert evident.kind is not None
    if post.activation in ("softmax", "sigmoid"):
        raise NetworkError(
            f"{evident.text}, and {reads}: the output is squashed twice, so its probabilities and masks are wrong; "
            f"remove one of the two, or confirm by head={evident.kind!r} (its output is the probability) or "
            f"head={post.activation!r} (its output is read as the bundle does)"
        )
    scale = "log-probabilities" if evident.kind == "log-softmax inside" else "probabilities"
    text = f"{evident.text}: its values are {scale}, which are not squashed again; output='logit' is this raw output"
    evidence = (evident.text, reads) if reads else (evident.text,)
    if post.activation == "other":
        text += "; the postprocessing applies a further function, which the maps leave out"
        return Head(evident.kind, True, evidence, post), CheckResult("head", "warned", text)
    return Head(evident.kind, True, evidence, post), CheckResult("head", "handled", text)


def _raw(
    evident: HeadEvidence, post: Postprocessing, reads: str, values: str, channels: int
) -> tuple[Head, CheckResult]:
    """Decide on an output that is not the result of softmax or sigmoid."""
    shown = tuple(filter(None, (evident.text or values, reads)))
    if post.activation in ("softmax", "sigmoid"):
        return Head(post.activation, True, shown, post), CheckResult("head", "passed", f"raw output: {reads}")
    if post.declared == "regression":
        why = (values, "metadata.json declares a regression")
        return Head("raw", True, why, post), CheckResult("head", "passed", "no scores of classes: a regression")
    usual: HeadKind = "softmax" if channels > 1 else "sigmoid"
    if post.activation is None and evident.unusual is None:
        if post.argmax and channels > 1:
            return Head("softmax", True, shown, post), CheckResult("head", "passed", f"raw output: {reads}")
        if not post.thresholds:
            reasons = (*shown, f"{usual} is assumed, since no postprocessing is known")
            text = f"raw output, {usual} assumed: {shown[0]}"
            return Head(usual, False, reasons, post), CheckResult("head", "passed", text)
    cause = f"the network ends in {evident.unusual}" if evident.unusual else reads
    text = (
        f"the meaning of the output is unknown: {cause}; it is read as raw output whose {usual} gives probabilities; "
        f"{_ASK}"
    )
    return Head("unknown", False, (cause, *shown), post), CheckResult("head", "warned", text)


def _in_words(post: Postprocessing) -> str:
    parts = []
    if post.activation is not None:
        name = "another function" if post.activation == "other" else post.activation
        parts.append(f"applies {name}")
    if post.argmax:
        parts.append("takes the argmax")
    elif post.thresholds:
        parts.append(f"compares with {', '.join(f'{t:g}' for t in post.thresholds)}")
    return f"the postprocessing {' and '.join(parts)}" if parts else ""


def _measured(sample: Sample) -> HeadEvidence:
    model = sample.model.without_autocast()
    devices = [sample.window.device] if sample.window.is_cuda else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        x = sample.window.detach().clone().requires_grad_(True)
        at = replace(sample, model=model)
        out = at.run(x)
        names, averaged = last_operations(out)
        softmax_over_channels = all(_over_channels(node) for node in _nodes(out) if _name(node).endswith("Softmax"))
        with torch.no_grad():
            outputs = [out.detach(), at.run(10 * x.detach()), at.run(at.noise(0) * at.scale)]
    outputs = [o.double() for o in outputs]
    seen = next(iter(names)) if len(names) == 1 else None
    return _judged(seen, names, averaged, softmax_over_channels, outputs)


def _judged(
    seen: str | None, names: set[str], averaged: bool, over_channels: bool, outputs: list[Tensor]
) -> HeadEvidence:
    """Return the evidence of the last operations and of the outputs (1, K, …) on three inputs."""
    within = all(bool((o >= -CLOSE).all() & (o <= 1 + CLOSE).all()) for o in outputs)
    several = outputs[0].shape[1] > 1
    sums = [o.sum(1) for o in outputs]
    if several and within and all(bool(((s - 1).abs() <= CLOSE).all()) for s in sums):
        how = (
            "the network ends in softmax" if seen == "Softmax" else "the channels sum to 1 on the scan and on two tests"
        )
        return HeadEvidence("softmax inside", True, how)
    if several and all(bool((o.logsumexp(1).abs() <= CLOSE).all()) for o in outputs):
        how = "the network ends in log-softmax" if seen == "LogSoftmax" else "the exponentials of the channels sum to 1"
        return HeadEvidence("log-softmax inside", True, how)
    if seen in _INSIDE and not averaged and (seen == "Sigmoid" or over_channels):
        name = {"Softmax": "softmax and returns some of its channels", "LogSoftmax": "log-softmax"}.get(seen, "sigmoid")
        kind = _INSIDE[seen]
        if seen == "Softmax" and not several:
            kind = "sigmoid inside"  # one channel of a softmax is the probability of its class
        return HeadEvidence(kind, True, f"the network ends in {name}")
    if within and (names - _PLAIN or not names):
        what = "an average of sigmoids" if seen == "Sigmoid" else _listed(names)
        return HeadEvidence("sigmoid inside", False, f"the output stays in 0 to 1 on three inputs and ends in {what}")
    odd = names - _PLAIN - set(_INSIDE)
    text = f"the network ends in {_listed(names)}" if names else ""
    return HeadEvidence(None, True, text, seen if odd and seen and not averaged else None)


def last_operations(output: Tensor) -> tuple[set[str], bool]:
    """Return the last operations, as autograd names them, that change the values of an output of any shape.

    Views, joins and resizing are passed over, and so are sums and averages.

    Returns:
        The names, and True if sums or averages were passed over. Empty if autograd knows none.
    """
    nodes = _nodes(output)
    averaged = any(_name(n) in _AVERAGES for n in _visited(output))
    return {_name(n) for n in nodes}, averaged


def _visited(output: Tensor) -> list[Any]:
    """Return the passed-over nodes and the first others, each once."""
    todo: list[Any] = [] if output.grad_fn is None else [output.grad_fn]
    seen: list[Any] = []
    while todo:
        node = todo.pop()
        if node in seen or len(seen) > 500:
            continue
        seen.append(node)
        if _name(node) in _PASSES or _name(node) in _AVERAGES:
            todo += [following for following, _ in node.next_functions if following is not None]
    return seen


def _nodes(output: Tensor) -> list[Any]:
    return [n for n in _visited(output) if _name(n) not in _PASSES and _name(n) not in _AVERAGES]


def _name(node: Any) -> str:
    return str(node.name()).split("::")[-1].split("Backward")[0]


def _over_channels(node: Any) -> bool:
    """Return True if a softmax node is over the second axis, where autograd stores it."""
    dim, result = getattr(node, "_saved_dim", None), getattr(node, "_saved_result", None)
    if dim is None or result is None:
        return False
    dim = dim - 2**64 if dim >= 2**63 else dim
    return bool(dim % result.ndim == 1)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "an operation that autograd does not show"
