"""The processes that share the work on one case: each processes a part of the windows, and their sums are added up.

A loop over windows adds to tensors. With several ranks, each rank runs its part of the loop, and the additions of all
ranks are summed when the loop ends, so that every rank continues with the same numbers. Methods are unaware of this,
and no network is wrapped: gradients are `torch.autograd.grad` of each rank's own copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from esegeta_monai.errors import EsegetaError, MethodError, MethodTimeout, RankLost, UsageError, named_reason

__all__ = [
    "SHARES",
    "Processes",
    "Share",
    "Summed",
    "join",
    "leave",
    "local_device",
    "part_of",
    "process_group",
    "tensors_of",
]

Share = Literal["cases", "windows", "methods"]
"""How ranks divide the work: by cases, by the windows of each case, or by methods and targets of each case."""
SHARES: tuple[Share, ...] = get_args(Share)

T = TypeVar("T")
M = TypeVar("M")


class Summed(Protocol):
    """An object that adds up over windows in its attributes: tensors, or None before the first window."""

    @property
    def summed(self) -> tuple[str, ...]:
        """The names of these attributes."""


@dataclass(frozen=True)
class Processes:
    """This process among those that compute a case together.

    Args:
        rank: number of this process, from 0.
        size: number of processes.

    >>> alone = Processes()
    >>> alone.share([1, 2, 3]), Processes(1, 2).share([1, 2, 3])
    ([1, 2, 3], [2, 3])
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Return all processes of ``torch.distributed``.

        Raises:
            UsageError: the process was started as one of several, but they have not been joined.
        """
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError(
                "this is one of several processes, but torch.distributed is not initialised: call "
                "torch.distributed.init_process_group() first"
            )
        # not ignite.distributed, which still reports a process group that has been destroyed
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, items: Sequence[T], turn: int = 0) -> list[T]:
        """Return this rank's part of a sequence; the lengths of parts differ by at most one.

        ``turn`` = 0, 1, … rotates the parts, so that over several sequences no rank always has the longer one.

        >>> [Processes(1, 2).share([1, 2, 3], turn) for turn in range(2)]
        [[2, 3], [1]]
        """
        return part_of(items, (self.rank + turn) % self.size, self.size)

    def share_windows(self, jobs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return this rank's part of (volume, window) jobs; all jobs of a window go to the same rank."""
        own = set(self.share(sorted({w for _, w in jobs})))
        return [job for job in jobs if job[1] in own]

    def part(self, share: Share, methods: Sequence[M], targets: Sequence[T]) -> list[tuple[list[M], list[T]]]:
        """Return the (methods, targets) that this rank runs: all of them, unless ``share`` is "methods".

        >>> Processes(1, 2).part("methods", ["Saliency", "GradCam"], ["liver", "spleen"])
        [(['Saliency', 'GradCam'], ['spleen'])]
        """
        if share != "methods":
            return [(list(methods), list(targets))]
        pairs = self.share([(i, j) for j in range(len(targets)) for i in range(len(methods))])
        return [([methods[i] for i, k in pairs if k == j], [targets[j]]) for j in sorted({j for _, j in pairs})]

    def gather(self, value: Any) -> list[Any]:
        """Collect a picklable value from every rank, in their order.

        Raises:
            RankLost: another rank has ended.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _raise_rank_lost():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def summed(self, sums: Sequence[Tensor | Summed]) -> Iterator[None]:
        """Sum the additions to tensors, of any shape, over the ranks when the block ends, in place.

        Their values before the block count once. An error of one rank is raised on all, so that none waits for it.

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
        except Exception as error:  # raised after the other ranks have been informed
            failed = error
        known = self.gather(
            (None if failed is None else _error_summary(failed), [_layout(t) for t in tensors_of(sums)])
        )
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
        if tensor is None:  # this rank has run no window
            tensor = torch.zeros(shape, dtype=dtype, device=local_device() if device != "cpu" else "cpu")
            place.put(tensor)
        carried = tensor.detach().contiguous()
        if dist.get_backend() == "nccl":
            carried = carried.to(local_device())
        with _raise_rank_lost():
            dist.all_reduce(carried)
        if carried.data_ptr() != tensor.data_ptr():
            tensor.copy_(carried)


def part_of(items: Sequence[T], part: int, parts: int) -> list[T]:
    """Return part 0, 1, … of a sequence; the parts are contiguous, and their lengths differ by at most one.

    >>> [part_of("abcde", part, 3) for part in range(3)]
    [['a'], ['b', 'c'], ['d', 'e']]
    """
    return list(items[len(items) * part // parts : len(items) * (part + 1) // parts])


class _Place:
    """The place of a sum: a tensor, or an attribute of an object."""

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
        for item in sums
        for place in ([_Place(item)] if isinstance(item, Tensor) else [_Place(item, n) for n in item.summed])
    ]


def tensors_of(sums: Sequence[Tensor | Summed]) -> list[Tensor | None]:
    """Return the tensors of any shape that receive sums; None where nothing has been added yet."""
    return [place.tensor for place in _places(sums)]


def _layout(tensor: Tensor | None) -> tuple[tuple[int, ...], torch.dtype, str] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.device.type)


def _error_summary(error: Exception) -> tuple[type[EsegetaError], str]:
    kind: type[EsegetaError] = MethodTimeout if isinstance(error, MethodTimeout) else MethodError
    return kind, named_reason(error)


@contextmanager
def _raise_rank_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL have different messages
        raise RankLost(
            "another rank has ended, so this one stops too: finished maps are kept, and the same command resumes the "
            f"run ({str(error).splitlines()[0][:200]})"
        ) from error


@contextmanager
def process_group(backend: str | None = None) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` (or SLURM with its variables) started, for the duration of the block.

    Without ``WORLD_SIZE`` in the environment, there is one process and no group is made. An existing group is used and
    not ended.

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
    """Join the processes that ``torchrun`` (or SLURM with its variables) started, unless they have been joined.

    Args:
        backend: None: NCCL if each process of this machine has its own GPU, else gloo, because NCCL rejects two
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
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """Return the device of this process: GPU ``LOCAL_RANK`` modulo the number of GPUs, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
