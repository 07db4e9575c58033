"""Follow the axes of the window through every operation of one forward pass.

So it is known, whatever the modules are called, which axis of a layer's output has the channels, where its tokens lie
in the window, whether the window was flipped or turned before a layer saw it, and which slice of it a call got.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.network.axes import Label, label_of, put_label, unknown
from esegeta_monai.engine.network.axis_rules import RULES, combined
from esegeta_monai.utils.upstream import TorchDispatchMode, operation_schema

__all__ = ["AxisTrace"]


class AxisTrace(TorchDispatchMode):
    """A mode that labels the results of all operations on labelled tensors.

    Outside `torch.inference_mode`, views are other objects than those that the mode sees; they are recognised by the
    memory that they show.
    """

    def __init__(self) -> None:
        super().__init__()
        self._views: dict[Any, tuple[Label, Tensor]] = {}  # results outside inference mode, kept alive
        self._written: dict[int, Any] = {}  # memory that values of other axes were written into, kept alive

    def label(self, tensor: Tensor) -> Label | None:
        """Return the label of a tensor of any shape; None: it is a constant, or was computed outside the trace."""
        if self._written and tensor.untyped_storage().data_ptr() in self._written:
            put_label(tensor, Label(tuple(unknown(n) for n in tensor.shape)))
        if self._views and label_of(tensor) is None and (known := self._views.get(_place(tensor))) is not None:
            put_label(tensor, known[0])
        return label_of(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, arguments, writes = operation_schema(func)
        name = name.removeprefix("aten::")
        rule = RULES.get(name.removesuffix("_") if name not in RULES else name)
        pointwise = torch.Tag.pointwise in func.tags
        if rule is None and not pointwise:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for t in tensors_in((args, kwargs)):
            self.label(t)
        result = func(*args, **kwargs)
        operands = [t for t in tensors_in((args, kwargs)) if label_of(t) is not None]
        outputs = list(tensors_in(result))
        if not operands:
            return result
        labels: Sequence[Label | None] = []
        if pointwise and outputs:
            labels = [combined(operands, outputs[0].shape)]
        elif rule is not None:
            given = dict(zip(arguments, args)) | kwargs
            try:
                labels = rule(given, outputs)
            except (IndexError, KeyError, TypeError):  # a variant of the operation with other arguments
                labels = []
        through = frozenset().union(*(label.through for t in operands if (label := label_of(t)) is not None))
        for output, label in zip(outputs, [*labels, *(None for _ in outputs[len(labels) :])]):
            fits = label is not None and tuple(a.size for a in label.axes) == tuple(output.shape)
            axes = label.axes if fits and label is not None else tuple(unknown(n) for n in output.shape)
            before = label_of(output)
            if writes and output.numel() and (before is None or before.axes != axes):
                storage = output.untyped_storage()  # a view of it has the axes that its base had
                self._written[storage.data_ptr()] = storage
            new = Label(axes, label.fixed if label is not None else (), through)
            put_label(output, new)
            if not torch.is_inference_mode_enabled() and output.numel():
                self._views[_place(output)] = (new, output)
        return result


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two tensors that show the same memory, of any shape, have in common."""
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors, of any shape, in nested arguments or results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (tuple, list)) else []
