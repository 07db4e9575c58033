"""What an evaluator with an iteration of its own passes to its inferer beside the image."""

from __future__ import annotations

from typing import Any

from monai.engines import SupervisedEvaluator, SupervisedTrainer

__all__ = ["InfererCalls", "plain_inferer", "watched"]


class InfererCalls:
    """An engine's inferer, called as ever, that keeps the further arguments of its last call.

    Evaluators such as that of VISTA3D hand prompts to the inferer which ``prepare_batch`` does not know.

    >>> calls = InfererCalls(lambda inputs, network, **more: network(inputs))
    >>> calls(1, network=abs, prompt=3), calls.args, calls.kwargs
    (1, (), {'prompt': 3})
    """

    def __init__(self, inferer: Any) -> None:
        self.inferer = inferer
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args = args[2:]
        self.kwargs = {k: v for k, v in kwargs.items() if k not in ("inputs", "network")}
        return self.inferer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inferer, name)


def plain_inferer(engine: Any) -> Any:
    """The engine's own inferer, whether it is watched or not."""
    inferer = engine.inferer
    return inferer.inferer if isinstance(inferer, InfererCalls) else inferer


def watched(engine: Any) -> InfererCalls | None:
    """From now on the calls of an engine whose iteration is not MONAI's own; None for MONAI's, which pass on what
    ``prepare_batch`` returns."""
    iteration = getattr(type(engine), "_iteration", None)
    if iteration in (SupervisedEvaluator._iteration, SupervisedTrainer._iteration):
        return None
    engine.inferer = InfererCalls(plain_inferer(engine))
    return engine.inferer
