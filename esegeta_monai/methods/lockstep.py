"""Several generators of requests run in lock-step, so that a method reads several layers in the same sweeps."""

from __future__ import annotations

from collections.abc import Generator, Hashable, Sequence
from typing import Any

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request, View

__all__ = ["Several", "lockstep"]


class Several(Request):
    """Several requests as one. Its result is the list of their results."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.layers = tuple(dict.fromkeys(name for r in requests for name in r.layers))
        self.input_gradient = any(r.input_gradient for r in requests)
        self.backward = any(r.backward for r in requests)
        self.everywhere = any(r.everywhere for r in requests)
        self.before_gradient = not self.backward and any(r.before_gradient for r in requests)

    @property
    def key(self) -> Hashable:
        return tuple(r.key for r in self.requests)

    @property
    def parts(self) -> list[Any] | None:
        parts = [r.parts for r in self.requests]
        return None if any(p is None for p in parts) else [holder for p in parts if p is not None for holder in p]

    def begin(self, objective: Objective) -> None:
        for request in self.requests:
            request.begin(objective)

    def see(self, view: View) -> None:
        for request in self.requests:
            if view.seen or request.everywhere:
                request.see(view)

    def result(self) -> list[Any]:
        return [r.result() for r in self.requests]


def lockstep(generators: Sequence[Generator[Request, Any, Any]]) -> Generator[Request, Any, list[Any]]:
    """Run generators side by side; requests of the same round become one request.

    The requests of a single generator are passed on unchanged, so that other methods can share them.

    Returns:
        The return value of each generator.
    """
    if len(generators) == 1:
        return [(yield from generators[0])]
    results: list[Any] = [None] * len(generators)
    answers: dict[int, Any] = dict.fromkeys(range(len(generators)))
    while answers:
        asked: dict[int, Request] = {}
        for i, answer in answers.items():
            try:
                asked[i] = generators[i].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
        answers = dict(zip(asked, (yield Several(list(asked.values()))))) if asked else {}
    return results
