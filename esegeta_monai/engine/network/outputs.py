"""The tensors that a network returns, and the one of them that is explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esegeta_monai.errors import NetworkError

__all__ = ["OutputChoice", "batch_first", "choose_output", "named_outputs", "select_output"]

KNOWN = ("pred", "logits", "out")
"""Usual keys of the prediction in a dict of outputs."""


@dataclass(frozen=True)
class OutputChoice:
    """The output that is explained where the user names none.

    Attributes:
        key: its key, see `select_output`.
        shapes: shape of every tensor that the network returns, by key.
        reason: why it was chosen; None: for no other reason than its place or its name.
    """

    key: int | str
    shapes: Mapping[int | str, tuple[int, ...]]
    reason: str | None = None

    @property
    def listed(self) -> str:
        """All outputs with their shapes, in words."""
        return _listed(self.shapes)


def named_outputs(output: Any) -> dict[int | str, Tensor]:
    """Return all tensors, of any shape, in the output of a network, by the key that selects them.

    >>> import torch
    >>> list(named_outputs({"boxes": [torch.zeros(1, 4)], "scores": torch.zeros(1)}))
    ['boxes.0', 'scores']
    """
    if isinstance(output, Tensor):
        return {"": output}
    items: Any = output.items() if isinstance(output, Mapping) else enumerate(output) if _is_list(output) else ()
    tensors: dict[int | str, Tensor] = {}
    for key, value in items:
        own = key if isinstance(key, int) else str(key)
        if isinstance(value, Tensor):
            tensors[own] = value
        else:
            tensors |= {f"{own}.{inner}": tensor for inner, tensor in named_outputs(value).items()}
    return tensors


def choose_output(output: Any, preferred: Sequence[str] = ()) -> OutputChoice:
    """Choose the tensor that is explained if the user names none.

    It is the only tensor; the one that a bundle's postprocessing or metadata names; a dict's ``"pred"``, ``"logits"``
    or ``"out"``; the first tensor of a tuple or list.

    Args:
        output: tuple, list or dict of a network, nested or not; tensors of any shape.
        preferred: keys that a bundle's postprocessing or metadata names, the most specific first.

    Raises:
        NetworkError: none of these rules applies; the message lists all tensors with their shapes.
    """
    if not isinstance(output, Mapping) and not _is_list(output):
        raise NetworkError(
            f"the network returns {type(output).__name__}: only a tensor, or a tuple, list or dict of tensors, can be "
            "explained"
        )
    tensors = named_outputs(output)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if len(tensors) == 1:
        return OutputChoice(next(iter(tensors)), shapes, "it is the only tensor that the network returns")
    for name in preferred:
        for key in tensors:
            if str(key) == name:
                return OutputChoice(key, shapes, "it is the one that the bundle's postprocessing or metadata names")
    if isinstance(output, Mapping):
        known = [key for key in KNOWN if key in tensors]
        if known:
            return OutputChoice(known[0], shapes)
    elif tensors and (isinstance(output[0], Tensor) or _is_list(output[0])):
        return OutputChoice(next(iter(tensors)), shapes)
    raise NetworkError(
        f"the network returns a {type(output).__name__} with tensors {_listed(shapes)}: choose one with output=KEY "
        "(--network-output KEY)"
    )


def select_output(output: Any, key: int | str | Sequence[int | str] | None = None, axes: int | None = None) -> Tensor:
    """Select the tensor to explain from the output of a network, of any shape.

    Args:
        output: a tensor, or a tuple, list or dict of tensors, nested or not.
        key: number or key of the tensor; the path to it in nested outputs, ``"classification.0"``; for a tensor with
            another number of axes than the images, (B, heads, K, *spatial) or (B, steps, K), the index along its second
            axis. None: see `choose_output`.
        axes: number of axes of the batch of images (B, C, *spatial); None: unknown.

    Raises:
        NetworkError: there is no such tensor; the message lists the tensors.

    >>> import torch
    >>> stacked = torch.stack([torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)], 1)  # two heads of a 2D network
    >>> float(select_output({"heads": stacked}, "heads.1", axes=4).mean())
    1.0
    """
    if isinstance(output, Tensor):
        return _plain(output) if key is None else _of_tensor(output, key, axes, key)
    if key is None:
        key = choose_output(output).key
    value: Any = output
    for i, step in enumerate(steps := _steps(output, key)):
        if isinstance(value, Tensor):
            return _of_tensor(value, step, axes, key) if i == len(steps) - 1 else _refuse(output, key)
        value = _entry(value, step)
    return _plain(value) if isinstance(value, Tensor) else _refuse(output, key)


def batch_first(output: Tensor, n: int) -> Tensor:
    """Return the output of a network for n images as (n, K, …).

    One number per image, (n,), becomes (n, 1); what ``squeeze()`` leaves of a single image, () or (K,), becomes (1, 1)
    or (1, K).

    Raises:
        NetworkError: one number, or one vector, for several images.
    """
    if output.ndim > 1:
        return output
    if output.ndim == 1 and len(output) == n:
        return output[:, None]
    if n == 1:
        return output.reshape(1, -1)
    raise NetworkError(
        f"the network returns shape {tuple(output.shape)} for a batch of {n} images: it must give each image its own "
        "row; if it averages over the batch, wrap it so that it returns (B, K)"
    )


def _of_tensor(output: Tensor, step: Any, axes: int | None, key: Any) -> Tensor:
    """Select along the second axis of a tensor that has other axes than the images; 0 is also the tensor itself."""
    number = int(step) if _is_number(step) else None
    stacked = axes is not None and output.ndim > 2 and (output.ndim > axes or output.ndim == 3)
    if stacked and number is not None and -output.shape[1] <= number < output.shape[1]:
        return _plain(output)[:, number]
    if number == 0:
        return _plain(output)
    raise NetworkError(
        f"output={key!r}, but the network returns a single tensor {tuple(output.shape)}: omit output (on the command "
        "line --network-output)"
    )


def _steps(output: Any, key: Any) -> list[Any]:
    if isinstance(key, (tuple, list)):
        return list(key)
    whole = isinstance(output, Mapping) and any(str(k) == str(key) for k in output)
    return [key] if whole or not isinstance(key, str) else key.split(".")


_NONE = object()


def _entry(value: Any, step: Any) -> Any:
    if isinstance(value, Mapping):
        return next((v for k, v in value.items() if k == step or str(k) == str(step)), _NONE)
    if _is_list(value) and _is_number(step) and -len(value) <= int(step) < len(value):
        return value[int(step)]
    return _NONE


def _refuse(output: Any, key: Any) -> Tensor:
    tensors = {k: tuple(t.shape) for k, t in named_outputs(output).items()}
    raise NetworkError(
        f"output={key!r} is none of the tensors that the network returns: {_listed(tensors)}; choose one with "
        "output=KEY (--network-output KEY)"
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) > 0


def _is_number(step: Any) -> bool:
    return (isinstance(step, int) and not isinstance(step, bool)) or (
        isinstance(step, str) and step.lstrip("-").isdigit()
    )


def _listed(shapes: Mapping[int | str, tuple[int, ...]]) -> str:
    some = [f"{key} {shape}" for key, shape in shapes.items()]
    return ", ".join(some[:20]) + (f" and {len(some) - 20} more" if len(some) > 20 else "")


def _plain(output: Tensor) -> Tensor:
    """Return a tensor without its subclass; a plain one is not copied, because ``as_subclass`` hides it from modes."""
    return output if type(output) is Tensor else output.as_subclass(Tensor)
