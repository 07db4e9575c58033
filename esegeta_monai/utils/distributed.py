"""The processes that share the work on one case: each takes its part of the windows, and sums come together at the end.

A loop over windows adds into tensors. With several ranks each rank runs its part of the loop, and what it added is
summed over all of them when the loop ends, so that every rank goes on with the same numbers. No method knows of it, and
no network is wrapped: gradients are `torch.autograd.grad` of each rank's own copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from esegeta_monai.errors import EsegetaError, MethodError, MethodTimeout, RankLost, UsageError, named_reason

__all__ = ["SHARES", "Processes", "Share", "Summed", "join", "leave", "local_device", "process_group", "tensors_of"]

Share = Literal["cases", "windows", "methods"]
"""What the ranks share: each explains cases of its own; all compute each case together, window by window; or each takes
methods and targets of its own."""
SHARES: tuple[Share, ...] = get_args(Share)

T = TypeVar("T")
M = TypeVar("M")


class Summed(Protocol):
    """Something that adds up over windows in attributes of its own: a tensor each, None before the first window."""

    @property
    def summed(self) -> tuple[str, ...]:
        """The names of these attributes."""


class Processes:
    """This process among those that compute a case together.

    Args:
        rank, size: which of how many.

    >>> alone = Processes()
    >>> alone.share([1, 2, 3]), Processes(1, 2).share([1, 2, 3])
    ([1, 2, 3], [2, 3])
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def current(cls) -> Processes:
        """All processes of ``torch.distributed``.

        Raises:
            UsageError: the process was started as one of several, but they have not been joined.
        """
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError(
                "this is one of several processes, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() first"
            )
        # ignite.distributed is not asked: it goes on answering for a process group that has been destroyed
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, items: Sequence[T], turn: int = 0) -> list[T]:
        """This rank's part of a sequence, as long as that of the others (or one less).

        With ``turn`` = 0, 1, … the parts go round, so that over some sequences no rank has always the longer one.

        >>> [Processes(1, 2).share([1, 2, 3], turn) for turn in range(2)]
        [[2, 3], [1]]
        """
        n, place = len(items), (self.rank + turn) % self.size
        return list(items[n * place // self.size : n * (place + 1) // self.size])

    def part(self, share: Share, methods: Sequence[M], targets: Sequence[T]) -> list[tuple[list[M], list[T]]]:
        """Which methods this rank runs for which targets: all of them, unless methods are what is shared.

        >>> Processes(1, 2).part("methods", ["Saliency", "GradCam"], ["liver", "spleen"])
        [(['Saliency', 'GradCam'], ['spleen'])]
        """
        if share != "methods":
            return [(list(methods), list(targets))]
        pairs = self.share([(i, j) for j in range(len(targets)) for i in range(len(methods))])
        return [([methods[i] for i, k in pairs if k == j], [targets[j]]) for j in sorted({j for _, j in pairs})]

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in their order.

        Raises:
            RankLost: another rank has ended.
        """
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(found, value)
        return found

    @contextmanager
    def summed(self, sums: Sequence[Tensor | Summed]) -> Iterator[None]:
        """What is added to tensors inside is summed over the ranks at the end, in place.

        Whatever they held before counts once. An error of one rank becomes an error of all, so that none waits for it.

        Raises:
            MethodError, MethodTimeout: another rank failed.
            RankLost: another rank has ended.
        """
        if self.size == 1:
            yield
            return
        if self.rank:
            for tensor in tensors_of(sums):
                if tensor is not None:
                    tensor.zero_()
        failed: Exception | None = None
        try:
            yield
        except Exception as error:  # told to the others, then raised
            failed = error
        known = self.gather((None if failed is None else _described(failed), [_form(t) for t in tensors_of(sums)]))
        if failed is not None:
            raise failed
        for rank, (trouble, _) in enumerate(known):
            if trouble is not None:
                kind, text = trouble
                raise kind(f"rank {rank}: {text}")
        forms = [next((f for f in column if f is not None), None) for column in zip(*(forms for _, forms in known))]
        for place, form in zip(_places(sums), forms):
            if form is not None:
                self._reduce(place, *form)

    def _reduce(self, place: _Place, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
        tensor = place.tensor
        if tensor is None:  # no window of this rank's was seen
            tensor = torch.zeros(shape, dtype=dtype, device=local_device() if device != "cpu" else "cpu")
            place.put(tensor)
        carried = tensor.detach().contiguous()
        if dist.get_backend() == "nccl":
            carried = carried.to(local_device())
        with _lost():
            dist.all_reduce(carried)
        if carried.data_ptr() != tensor.data_ptr():
            tensor.copy_(carried)


class _Place:
    """Where a sum lies: a tensor, or an attribute."""

    def __init__(self, holder: Any, name: str | None = None) -> None:
        self.holder, self.name = holder, name

    @property
    def tensor(self) -> Tensor | None:
        return self.holder if self.name is None else getattr(self.holder, self.name)

    def put(self, value: Tensor) -> None:
        assert self.name is not None
        setattr(self.holder, self.name, value)


def _places(sums: Sequence[Tensor | Summed]) -> list[_Place]:
    return [
        place
        for one in sums
        for place in ([_Place(one)] if isinstance(one, Tensor) else [_Place(one, n) for n in one.summed])
    ]


def tensors_of(sums: Sequence[Tensor | Summed]) -> list[Tensor | None]:
    """The tensors that are added into, None where nothing has been added yet."""
    return [place.tensor for place in _places(sums)]


def _form(tensor: Tensor | None) -> tuple[tuple[int, ...], torch.dtype, str] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device.type)


def _described(error: Exception) -> tuple[type[EsegetaError], str]:
    kind: type[EsegetaError] = MethodTimeout if isinstance(error, MethodTimeout) else MethodError
    return kind, named_reason(error)


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL say it in words of their own
        raise RankLost(
            "another rank has ended, so this one stops too: finished maps stay, and the same command goes on from "
            f"there ({str(error).splitlines()[0][:200]})"
        ) from error


@contextmanager
def process_group(backend: str | None = None) -> Iterator[Processes]:
    """Joins the processes that ``torchrun`` (or SLURM with its variables) started, for the time of the block.

    Without ``WORLD_SIZE`` in the environment there is one process and nothing is joined; a group that exists is used
    as it is and left alone.

    Args:
        backend: see `join`.
    """
    before = dist.is_initialized()
    join(backend)
    try:
        yield Processes.current()
    finally:
        if not before:
            leave()


def join(backend: str | None = None) -> torch.device:
    """Joins the processes that ``torchrun`` (or SLURM with its variables) started, where there are several and they
    have not been joined yet.

    Args:
        backend: None: NCCL where each process of this machine has a GPU of its own, else gloo: NCCL refuses two
            processes on one GPU.

    Returns:
        `local_device`.
    """
    device = local_device()
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        alone = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend or ("nccl" if device.type == "cuda" and alone else "gloo"))
    return device


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """The device of this process: GPU ``LOCAL_RANK``, counted round where there are more processes than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
