"""Decompositions of operations into simpler ones, in plain torch.

The mode calls :func:`decompose` while it is active, so that the rules apply to every part. Each function here computes
the same result as the operation; the parts are differences, sums, products, elementwise functions and softmax, for
which every method has a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.rules.operations import Operation

__all__ = ["decompose", "standardised"]


def decompose(operation: Operation, operands: tuple[Tensor, ...]) -> Any:
    """Compute the result of an operation from its parts.

    Args:
        operation: the operation.
        operands: one tensor per slot, of the same shape as the original operand.

    Raises:
        RuleError: the operation has no decomposition.
    """
    parts = _PARTS.get(operation.name)
    if parts is None:
        raise operation.error("it has no decomposition")
    return parts(operation, operation.filled(operands))


# -- norms --------------------------------------------------------------------------------


def standardised(operation: Operation, a: dict[str, Any], frozen: bool = False) -> Tensor:
    """Compute (x − mean) / σ · weight + bias of an instance, group, layer or root-mean-square norm.

    Args:
        operation: the norm.
        a: its arguments by name; ``input`` (n, C, …), or (…, *normalized_shape) for layer norms.
        frozen: True: treat σ as a constant, so that the map is linear.

    Returns:
        A tensor of the shape of ``input``.
    """
    x: Tensor = a["input"]
    weight, bias, eps = a.get("weight"), a.get("bias"), a.get("eps")
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    if operation.name == "normalize":
        return _normalize(operation, a, frozen)
    if operation.name in ("layer_norm", "rms_norm"):
        dims = tuple(range(x.ndim - len(tuple(a["normalized_shape"])), x.ndim))
        y = _standardise(x, dims, eps, frozen, centre=operation.name == "layer_norm")
        y = y if weight is None else y * weight
        return y if bias is None else y + bias
    if operation.name == "group_norm":
        grouped = x.reshape(x.shape[0], a["num_groups"], -1)
        y = _standardise(grouped, (2,), eps, frozen).reshape(x.shape)
    else:
        y = _standardise(x, tuple(range(2, x.ndim)), eps, frozen)
    y = y if weight is None else y * weight.reshape(per_channel)
    return y if bias is None else y + bias.reshape(per_channel)


def _standardise(x: Tensor, dims: tuple[int, ...], eps: float, frozen: bool, centre: bool = True) -> Tensor:
    centred = x - x.mean(dims, keepdim=True) if centre else x
    scale = (_frozen(centred, frozen).square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * scale


def _frozen(x: Tensor, frozen: bool) -> Tensor:
    return x.detach() if frozen else x


def _normalize(operation: Operation, a: dict[str, Any], frozen: bool = False) -> Tensor:
    if a.get("p", 2.0) != 2:
        raise operation.error("only p = 2 has a rule")
    x = a["input"]
    length = _frozen(x, frozen).square().sum(a.get("dim", 1), keepdim=True).sqrt().clamp_min(a.get("eps", 1e-12))
    return x * length.reciprocal()


def _norm(operation: Operation, a: dict[str, Any]) -> Tensor:
    order = a.get("p", a.get("ord", 2))
    x, dim, keepdim = a["input"], a.get("dim"), bool(a.get("keepdim"))
    dims = tuple(range(x.ndim)) if dim is None else dim
    if order in (2, "fro", None):
        return x.square().sum(dims, keepdim=keepdim).sqrt()
    if order == 1 and operation.name == "vector_norm":
        return x.abs().sum(dims, keepdim=keepdim)
    raise operation.error(f"the norm of order {order} has no rule")


def _variance(operation: Operation, a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x, dim, keepdim = a["input"], a.get("dim"), bool(a.get("keepdim"))
    if isinstance(dim, bool):
        raise operation.error("give unbiased= by keyword")
    dims = tuple(range(x.ndim)) if dim is None else ((dim,) if isinstance(dim, int) else tuple(dim))
    unbiased = a.get("unbiased")
    correction = a["correction"] if "correction" in a else int(True if unbiased is None else unbiased)
    count = math.prod(x.shape[d] for d in dims)
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square().sum(dims, keepdim=keepdim) / (count - correction)
    return variance, mean if keepdim else x.mean(dims)


# -- attention --------------------------------------------------------------------------------


def _attention(operation: Operation, a: dict[str, Any]) -> Tensor:
    query, key, value = a["query"], a["key"], a["value"]
    if a.get("dropout_p"):
        raise operation.error("attention dropout is random: pass dropout_p=0.0 unless self.training")
    if a.get("enable_gqa"):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    scale = a.get("scale")
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
    mask = a.get("attn_mask")
    if a.get("is_causal"):
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def _multi_head_attention(operation: Operation, a: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Compute ``nn.MultiheadAttention`` of query, key and value (length, batch, embedding)."""
    query, key, value = a["query"], a["key"], a["value"]
    if a.get("dropout_p") and a.get("training", True):
        raise operation.error("attention dropout is random: pass training=self.training")
    for name in ("bias_k", "bias_v", "static_k", "static_v"):
        if a.get(name) is not None:
            raise operation.error(f"attention with {name} has no rule")
    if a.get("add_zero_attn"):
        raise operation.error("attention with add_zero_attn has no rule")
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    heads = a["num_heads"]
    if a.get("use_separate_proj_weight"):
        weights = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    else:
        weights = list(a["in_proj_weight"].chunk(3))
    biases = [None] * 3 if a.get("in_proj_bias") is None else list(a["in_proj_bias"].chunk(3))

    def split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = F.linear(x, weight, bias)  # (length, batch, embedding)
        length, batch, width = projected.shape
        return projected.reshape(length, batch, heads, width // heads).permute(1, 2, 0, 3)

    q, k, v = (split(x, w, b) for x, w, b in zip((query, key, value), weights, biases))
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)  # (batch, heads, length, source)
    mask = a.get("attn_mask")
    if mask is not None:
        mask = mask if mask.dim() == 2 else mask.reshape(scores.shape)
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    elif a.get("is_causal"):
        raise operation.error("is_causal needs its attn_mask")
    padding = a.get("key_padding_mask")
    if padding is not None:
        padding = padding[:, None, None, :]
        scores = scores.masked_fill(padding, -math.inf) if padding.dtype == torch.bool else scores + padding
    attention = scores.softmax(-1)
    mixed = (attention @ v).permute(2, 0, 1, 3).flatten(2)
    out = F.linear(mixed, a["out_proj_weight"], a.get("out_proj_bias"))
    if not a.get("need_weights", True):
        return (out if batched else out.squeeze(1)), None
    attention = attention.mean(1) if a.get("average_attn_weights", True) else attention
    return (out, attention) if batched else (out.squeeze(1), attention.squeeze(0))


# -- arithmetic --------------------------------------------------------------------------------


def _scaled_sum(operation: Operation, a: dict[str, Any]) -> Tensor:
    product = a["mat1"] @ a["mat2"]
    product = product.sum(0) if operation.name == "addbmm" else product
    return a["beta"] * a["input"] + a["alpha"] * product


def _glu(operation: Operation, a: dict[str, Any]) -> Tensor:
    value, gate = a["input"].chunk(2, dim=a.get("dim", -1))
    return value * gate.sigmoid()


def _cosine(operation: Operation, a: dict[str, Any]) -> Tensor:
    x, y, dim, eps = a["x1"], a["x2"], a["dim"], a["eps"]
    lengths = [t.square().sum(dim, keepdim=True).sqrt().clamp_min(eps).reciprocal() for t in (x, y)]
    return ((x * lengths[0]) * (y * lengths[1])).sum(dim)


def _extreme(operation: Operation, a: dict[str, Any]) -> Any:
    """Compute every spelling of maximum and minimum as ``amax`` of a stack or along dimensions."""
    lowest = operation.name in ("amin", "min", "minimum")
    x = a["input"]
    dims: tuple[int, ...]
    other = a.get("other", a["dim"] if isinstance(a.get("dim"), Tensor) else None)
    if other is not None:
        x, dims, keepdim, indices = torch.stack(torch.broadcast_tensors(x, other)), (0,), False, False
    else:
        dim, keepdim = a.get("dim"), bool(a.get("keepdim"))
        dims = tuple(range(x.ndim)) if dim is None or dim == () else ((dim,) if isinstance(dim, int) else tuple(dim))
        indices = operation.name in ("max", "min") and dim is not None
    values = -torch.amax(-x, dims, keepdim=keepdim) if lowest else torch.amax(x, dims, keepdim=keepdim)
    if not indices:
        return values
    where = torch.argmin(x, dims[0], keepdim) if lowest else torch.argmax(x, dims[0], keepdim)
    returned = torch.return_types.min if lowest else torch.return_types.max
    return returned((values, where))


_PARTS: dict[str, Callable[[Operation, dict[str, Any]], Any]] = {
    "instance_norm": standardised,
    "group_norm": standardised,
    "layer_norm": standardised,
    "rms_norm": standardised,
    "normalize": _normalize,
    "norm": _norm,
    "vector_norm": _norm,
    "var": lambda operation, a: _variance(operation, a)[0],
    "std": lambda operation, a: _variance(operation, a)[0].sqrt(),
    "var_mean": _variance,
    "std_mean": lambda operation, a: (lambda pair: (pair[0].sqrt(), pair[1]))(_variance(operation, a)),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "div": lambda operation, a: a["input"] * a["other"].reciprocal(),
    "rdiv": lambda operation, a: a["other"] * a["input"].reciprocal(),
    "addcmul": lambda operation, a: a["input"] + a["value"] * (a["tensor1"] * a["tensor2"]),
    "addcdiv": lambda operation, a: a["input"] + a["value"] * (a["tensor1"] / a["tensor2"]),
    "addmm": _scaled_sum,
    "addbmm": _scaled_sum,
    "baddbmm": _scaled_sum,
    "addmv": _scaled_sum,
    "lerp": lambda operation, a: a["input"] + a["weight"] * (a["end"] - a["input"]),
    "glu": _glu,
    "softmin": lambda operation, a: (-a["input"]).softmax(a["dim"]),
    "cosine_similarity": _cosine,
    "max": _extreme,
    "min": _extreme,
    "amin": _extreme,
    "maximum": _extreme,
    "minimum": _extreme,
}
