"""The operations of one window pass, recorded once and repeated on windows and parts of windows.

The recording uses a function mode, as the backward rules do: it sees modules, functional code and calls in place alike.
It refuses what could differ in another pass: random numbers, values that the network reads to decide, results of code
that it cannot see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from esegeta_monai.engine.local.operation import Call, Local
from esegeta_monai.engine.local.reach import volume, whole
from esegeta_monai.engine.local.table import SPLITS, local_of, pieces
from esegeta_monai.engine.rules.kinds import DIFFERENTIATES, LIKE
from esegeta_monai.engine.rules.mode import is_in_place
from esegeta_monai.engine.rules.operations import Operation, Slot, canonical_name, is_inert, map_tensors
from esegeta_monai.utils.upstream import active_transform, is_view

__all__ = ["NotLocal", "Step", "Tape", "record"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_RANDOM = _words(
    """rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal uniform poisson
    exponential geometric cauchy log_normal random gumbel_softmax fractional_max_pool"""
)
_READS = _words(
    """item tolist numpy __array__ __bool__ __float__ __int__ __index__ __complex__ __contains__ is_nonzero nonzero
    argwhere masked_select unique unique_consecutive bincount allclose equal one_hot"""
)
"""Operations whose result, or its shape, depends on values that a perturbation may change."""


class NotLocal(Exception):  # noqa: N818 - no error of the run: the plain pass is used instead
    """The reason why a network cannot be repeated in parts."""


@dataclass
class Step:
    """One operation of the tape.

    Attributes:
        operation: the call, with slots in place of its operands.
        operands, results: numbers of the tensors that it reads and makes.
        local: how one result is computed place by place; None: it depends on the whole of its operands.
        shapes: their shapes.
        pick: number of the result among several, of a split; None: all are kept.
        cost: multiplications of the whole operation.
    """

    operation: Operation
    operands: tuple[int, ...]
    results: tuple[int, ...]
    local: Local | None
    shapes: tuple[tuple[int, ...], ...]
    pick: int | None = None
    cost: float = 0.0

    def run(self, operands: Sequence[Tensor]) -> list[Tensor]:
        """Compute all results (*shape) from whole operands, each of the shape that was recorded."""
        values = self.operation.function(*operands)
        if self.pick is not None:
            return [values[self.pick]]
        tensors: list[Tensor] = []
        map_tensors(tensors.append, values)
        if [tuple(t.shape) for t in tensors] != list(self.shapes):
            raise NotLocal(f"the shape of the result of {self.operation.name!r} depends on the image")
        return tensors


@dataclass
class Tape:
    """The operations between a window and the network's output.

    Attributes:
        steps: in order; those that the output does not depend on are left out.
        shapes: shape of each tensor, by number; 0 is the window (1, C, *roi).
        item_sizes: bytes of an element of each tensor.
        output: number of the output.
        cached: numbers of the tensors that have to be kept of an unperturbed pass, so that a part of the operations can
            be repeated.
    """

    steps: list[Step]
    shapes: list[tuple[int, ...]]
    item_sizes: list[int]
    output: int
    cached: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = self._needed_steps()
        self.cached = self._kept()

    @property
    def cache_bytes(self) -> int:
        """Bytes of the tensors that are kept of one window."""
        return sum(volume(whole(self.shapes[i])) * self.item_sizes[i] for i in self.cached)

    @property
    def cost(self) -> float:
        """Multiplications of a whole pass."""
        return sum(step.cost for step in self.steps)

    @property
    def widened(self) -> list[str]:
        """Names of the operations that look at the whole of their operands, each once, in order."""
        return list(dict.fromkeys(step.operation.name for step in self.steps if step.local is None))

    def _needed_steps(self) -> list[Step]:
        needed, steps = {self.output}, []
        for step in reversed(self.steps):
            if needed & set(step.results):
                needed |= set(step.operands)
                steps.append(step)
        return steps[::-1]

    def _kept(self) -> frozenset[int]:
        """Return the tensors that some step may read beyond the part that has changed."""
        kept = {0, self.output}
        for step in self.steps:
            alone = step.local is not None and len(step.operands) == 1 and step.local.reaches[0].same
            if not alone:
                kept |= set(step.operands)
        return frozenset(kept)

    def last_uses(self) -> list[list[int]]:
        """Return for each step the tensors that no later step reads."""
        last = {i: position for position, step in enumerate(self.steps) for i in step.operands}
        tensors: list[list[int]] = [[] for _ in self.steps]
        for i, position in last.items():
            tensors[position].append(i)
        return tensors

    def run(self, window: Tensor, keep: Iterable[int] = ()) -> dict[int, Tensor]:
        """Repeat a whole pass on a window (1, C, *roi).

        Args:
            window: the window.
            keep: numbers of further tensors that are returned; each other one is freed after its last use.

        Returns:
            The output and the kept tensors, by number.
        """
        kept = {self.output, *keep}
        values = {0: window}
        for step, done in zip(self.steps, self.last_uses()):
            values.update(zip(step.results, step.run([values[i] for i in step.operands])))
            for i in done:
                if i not in kept:
                    del values[i]
        return {i: values[i] for i in kept}


_NUMBER = "_esegeta_number"


class _Recorder(TorchFunctionMode):
    """The mode that records operations on everything computed from the window."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.shapes: list[tuple[int, ...]] = []
        self.item_sizes: list[int] = []
        self.reason: str | None = None
        self._token = object()
        self._stale: set[int] = set()
        self._memory: dict[int, set[int]] = {}
        """Numbers of the tensors in each memory."""
        own = [*module.parameters(), *module.buffers()]
        self._own_memory = {t.untyped_storage().data_ptr() for t in own if t.device.type != "meta"}

    def refuse(self, reason: str) -> NotLocal:
        """Keep the first reason, which a network could swallow with the exception, and return the exception."""
        self.reason = self.reason or reason
        return NotLocal(self.reason)

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a recorded tensor, of any shape; None for any other one."""
        mark = getattr(tensor, _NUMBER, None)
        if mark is None or mark[0] is not self._token:
            return None
        if mark[1] in self._stale:
            raise self.refuse("a tensor is written to in place through another view of its memory")
        return int(mark[1])

    def enter(self, tensor: Tensor) -> int:
        """Give a tensor, of any shape, the next number."""
        number = len(self.shapes)
        self.shapes.append(tuple(tensor.shape))
        self.item_sizes.append(tensor.element_size())
        setattr(tensor, _NUMBER, (self._token, number))
        self._memory.setdefault(_memory(tensor), set()).add(number)
        return number

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, in_place = canonical_name(func)
        if name in _RANDOM:
            raise self.refuse(f"{name!r} draws random numbers")
        if is_inert(name):
            return func(*args, **kwargs)
        numbers, operands = self._operands(name, args, kwargs)
        if not operands:
            return func(*args, **kwargs)
        if name in _READS or name in DIFFERENTIATES:
            raise self.refuse(f"the network reads values to decide what it computes ({name!r})")
        if active_transform() is not None or kwargs.get("out") is not None:
            raise self.refuse(f"{name!r} runs inside a transform of torch.func, or with out=")
        in_place = in_place or is_in_place(func, name, args, kwargs)
        operation = self._operation(name, func, args, kwargs, in_place, operands)
        self._check(operation)
        target: Any = (args[0] if args else next(iter(kwargs.values()))) if in_place else None
        before = self._memory.get(_memory(target), set()).copy() if target is not None else set()
        result = func(*args, **kwargs)
        if name == "type" and isinstance(result, str):
            return result
        self._append(operation, numbers, operands, target if in_place else result)
        self._stale |= before  # views share the memory that was written to
        return result

    def _operands(self, name: str, args: Any, kwargs: Any) -> tuple[list[int], list[Tensor]]:
        """Return numbers and values of the recorded tensors in the arguments."""
        numbers: list[int] = []
        operands: list[Tensor] = []

        def visit(tensor: Tensor) -> None:
            number = self.number(tensor)
            if number is not None:
                numbers.append(number)
                operands.append(tensor)
            elif tensor.requires_grad and not tensor.is_leaf:
                raise self.refuse("code that a function mode cannot see (TorchScript, a compiled or custom function)")

        map_tensors(visit, tuple(args[:1]) if name in LIKE else tuple(args))
        map_tensors(visit, dict(kwargs))
        return numbers, operands

    def _operation(
        self, name: str, func: Any, args: Any, kwargs: Any, in_place: bool, operands: Sequence[Tensor]
    ) -> Operation:
        """Return the call with slots in place of its operands."""
        slots = iter(range(len(operands)))
        first = args[0] if args else None

        def slot(tensor: Tensor) -> Any:
            if self.number(tensor) is not None:
                return Slot(next(slots))
            if in_place and tensor is first:
                if is_view(tensor) or _memory(tensor) in self._own_memory:
                    raise self.refuse(f"{name!r} writes into a buffer of the network, or into a view of one")
                return tensor.detach().clone()  # as it was before this pass wrote into it
            return tensor

        def like(tensor: Tensor) -> Tensor:
            return tensor.new_empty(()).expand(tensor.shape)  # its shape and type are all that is read

        if name in LIKE:
            given: tuple[Any, ...] = (map_tensors(slot, args[0]), *map_tensors(like, tuple(args[1:])))
        else:
            given = map_tensors(slot, tuple(args))
        return Operation(name, func, given, map_tensors(slot, dict(kwargs)), in_place)

    def _check(self, operation: Operation) -> None:
        """Refuse what another pass of the same window could do otherwise."""
        name = operation.name
        if name == "batch_norm" and (operation.argument("training") or operation.argument("running_mean") is None):
            raise self.refuse("batch norm takes its statistics from the batch")
        training = operation.argument("training", operation.argument("train", "dropout" in name))
        if training or (operation.argument("dropout_p", 0.0) > 0 and name == "scaled_dot_product_attention"):
            raise self.refuse(f"{name!r} is random, as it is called for training")
        index = name == "getitem" and any(isinstance(v, Slot) for v in _flat(operation.args[1:]))
        if index or (name == "where" and len(operation.args) + len(operation.kwargs) == 1):
            raise self.refuse(f"the network reads values to decide what it computes ({name!r})")

    def _append(self, operation: Operation, numbers: Sequence[int], operands: Sequence[Tensor], result: Any) -> None:
        """Append an operation whose result has been computed."""
        tensors: list[Tensor] = []
        map_tensors(tensors.append, result)
        if not tensors or (not isinstance(result, (Tensor, tuple, list))):
            raise self.refuse(f"the network reads values to decide what it computes ({operation.name!r})")
        results = [self.enter(t) for t in tensors]
        call = Call(operation, tuple(operands), tuple(tensors[0].shape))
        if operation.name in SPLITS:
            for i, (number, local) in enumerate(zip(results, pieces(call, tensors))):
                self._add(Step(operation, tuple(numbers), (number,), local, (self.shapes[number],), i))
            return
        local = local_of(call) if len(tensors) == 1 and isinstance(result, Tensor) else None
        shapes = tuple(self.shapes[i] for i in results)
        self._add(Step(operation, tuple(numbers), tuple(results), local, shapes))

    def _add(self, step: Step) -> None:
        size = sum(volume(whole(shape)) for shape in step.shapes)
        step.cost = size * (1.0 if step.local is None else step.local.cost)
        self.steps.append(step)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [item for part in value for item in _flat(part)]
    return [value]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(run: Callable[[Tensor], Tensor], window: Tensor, module: nn.Module) -> tuple[Tape, Tensor]:
    """Record one pass of a network.

    Args:
        run: computes the output (1, R, *out_roi) of a window; calls the network once.
        window: (1, C, *roi).
        module: the network, whose parameters and buffers are constants.

    Returns:
        The tape, and the output of this pass, which may be rounded otherwise than without gradients.

    Raises:
        NotLocal: the pass could differ for another window in a way that the tape does not follow.
    """
    recorder = _Recorder(module)
    # with gradients, a tensor that the mode has not seen shows that it depends on the window; nothing is kept for them
    with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_drop, _never):
        x = window.clone().requires_grad_(True).clone()
        recorder.enter(x)
        with recorder:
            out = run(x)
        number = recorder.number(out)
    if recorder.reason is not None:
        raise NotLocal(recorder.reason)
    if number is None:
        raise NotLocal("code that a function mode cannot see (TorchScript, a compiled or custom function)")
    return Tape(recorder.steps, recorder.shapes, recorder.item_sizes, number), out.detach()


def _drop(tensor: Tensor) -> None:
    return None


def _never(packed: None) -> Tensor:
    raise NotLocal("the network differentiates in its forward pass")
