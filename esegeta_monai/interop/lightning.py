"""Lightning: a callback that explains the validation cases of a trainer, with the handlers of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from monai.engines.utils import default_prepare_batch
from monai.utils import optional_import
from torch import nn

from esegeta_monai.errors import UsageError
from esegeta_monai.handlers.base import CaseHandler

__all__ = ["ExplanationCallback"]

_IMPORTS = [optional_import(name, name="Callback") for name in ("lightning.pytorch", "pytorch_lightning")]
_INSTALLED = [callback for callback, exists in _IMPORTS if exists]
_Callback: Any = _INSTALLED[0] if _INSTALLED else object


class ExplanationCallback(_Callback):
    """A callback that runs handlers on each validation batch, as MONAI's evaluator would.

    Each batch is predicted once more, by a `SupervisedEvaluator` with the module's network and the given inferer, to
    which the handlers are attached. The maps are those of the handlers, bit for bit. Which epochs and cases are
    explained is a setting of the handlers (``epochs``, ``cases``); other batches are not predicted again. The sanity
    check before training is left out. Training is not changed: data and random numbers are the trainer's own.

    Args:
        handlers: `ExplanationHandler` or `EvaluationHandler`, one or several.
        network: name of the module's network, such as ``"net"``; None: the module itself.
        inferer: inferer of MONAI; None: the network sees the whole image.
        prepare_batch: function of MONAI's engines that takes the image from a batch.
        amp: autocast, on CUDA; None: if the trainer's precision is mixed.
        dataloader: number of the explained validation loader, if there are several.

    Raises:
        UsageError: Lightning is not installed, or the module has no such network.

    Example (the folder needs ``{epoch}`` to keep the maps of all epochs)::

        explain = ExplanationHandler(["GradCam"], output_dir="seen/epoch{epoch:03d}", epochs=5, cases=2)
        Trainer(callbacks=[ExplanationCallback(explain, network="net", inferer=inferer)])

    >>> ExplanationCallback([], network="net").network
    'net'
    """

    def __init__(
        self,
        handlers: CaseHandler | Sequence[CaseHandler],
        *,
        network: str | None = None,
        inferer: Any = None,
        prepare_batch: Callable[..., Any] = default_prepare_batch,
        amp: bool | None = None,
        dataloader: int = 0,
    ) -> None:
        if not _INSTALLED:
            raise UsageError('the callback needs Lightning: pip install "esegeta-monai[lightning]"')
        super().__init__()
        self.handlers = [handlers] if isinstance(handlers, CaseHandler) else list(handlers)
        self.network, self.inferer, self.prepare_batch = network, inferer, prepare_batch
        self.amp, self.dataloader = amp, dataloader
        self._evaluator: SupervisedEvaluator | None = None

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the evaluator, at the first epoch, and begin an epoch of it."""
        if trainer.sanity_checking or not self.handlers:
            return
        if self._evaluator is None:
            self._evaluator = self._made(trainer, pl_module)
            self._evaluator.fire_event(Events.STARTED)
        self._evaluator.state.epoch = trainer.current_epoch + 1
        self._evaluator.state.iteration = 0
        self._evaluator.fire_event(Events.EPOCH_STARTED)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Predict and explain a batch."""
        evaluator = self._evaluator
        if trainer.sanity_checking or evaluator is None or dataloader_idx != self.dataloader:
            return
        epoch = evaluator.state.epoch
        if not any(handler.wants_batch(epoch) for handler in self.handlers):
            return
        evaluator.state.iteration += 1
        evaluator.state.batch = batch
        evaluator.fire_event(Events.ITERATION_STARTED)
        evaluator.state.output = evaluator._iteration(evaluator, batch)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """End the epoch."""
        if self._evaluator is not None and not trainer.sanity_checking:
            self._evaluator.fire_event(Events.EPOCH_COMPLETED)
            if trainer.state.fn != "fit":
                self._finish()

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the records of the last folder."""
        self._finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Write the records of what is done."""
        self._finish()

    def _finish(self) -> None:
        if self._evaluator is not None:
            self._evaluator.fire_event(Events.COMPLETED)
            self._evaluator = None

    def _made(self, trainer: Any, pl_module: Any) -> SupervisedEvaluator:
        network = pl_module if self.network is None else getattr(pl_module, self.network, None)
        if not isinstance(network, nn.Module):
            raise UsageError(
                f"network={self.network!r} is no network of {type(pl_module).__name__}: give the name of an attribute "
                "that is a module, or None for the module itself"
            )
        loaders = trainer.val_dataloaders
        loader = loaders[self.dataloader] if isinstance(loaders, (list, tuple)) else loaders
        mixed = "mixed" in str(trainer.precision)
        kind = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float16
        return SupervisedEvaluator(
            pl_module.device,
            val_data_loader=loader,
            network=network,
            inferer=self.inferer,
            prepare_batch=self.prepare_batch,
            amp=mixed if self.amp is None else self.amp,
            amp_kwargs={"dtype": kind} if mixed else None,
            val_handlers=self.handlers,
        )
