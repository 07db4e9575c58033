"""Record the arguments that an evaluator with a custom iteration passes to its inferer besides the image."""

from __future__ import annotations

from typing import Any

from monai.engines import SupervisedEvaluator, SupervisedTrainer

__all__ = ["InfererCalls", "plain_inferer", "watched"]


class InfererCalls:
    """A wrapper of an engine's inferer that stores the further arguments of the last call.

    Evaluators such as that of VISTA3D pass prompts to the inferer that ``prepare_batch`` does not return.

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
    """Return the engine's own inferer, without `InfererCalls`."""
    inferer = engine.inferer
    return inferer.inferer if isinstance(inferer, InfererCalls) else inferer


def watched(engine: Any) -> InfererCalls | None:
    """Wrap the inferer of an engine with a custom iteration in `InfererCalls` and return the wrapper.

    Return None for MONAI's own iterations, which pass what ``prepare_batch`` returns.
    """
    iteration = getattr(type(engine), "_iteration", None)
    if iteration in (SupervisedEvaluator._iteration, SupervisedTrainer._iteration):
        return None
    engine.inferer = InfererCalls(plain_inferer(engine))
    return engine.inferer
