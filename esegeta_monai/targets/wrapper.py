"""A target as the last layer of a network, for libraries that explain a function of the image."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.checks.base import small_sample
from esegeta_monai.engine.checks.head import HeadEvidence, evidence_of, find_head
from esegeta_monai.engine.head import Head, Postprocessing
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.outputs import batch_first, select_output
from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.score import Case, Score
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import TARGETS, need_class_axis

__all__ = ["TargetWrapper"]

logger = logging.getLogger("esegeta_monai")


class TargetWrapper(nn.Module):
    """``x ↦ (s_1(P(x)), …, s_K(P(x)))``: maps images (B, C, *spatial) to scores (B, K); differentiable.

    This is the wrapper of TorchEsegeta for segmentation networks. Captum can use it directly: ``target=k`` chooses the
    column. Masks are frozen on the prediction of an unperturbed image, given by `freeze` or ``prediction``, or else by
    the first call. Methods that start elsewhere on a path do not call with the image first: call `freeze` for them.
    A frozen mask is no part of the graph, and the score sums outputs under it instead of counting voxels, so the
    gradient is that of the outputs and not zero.

    The graph of all windows is kept for the backward pass; `esegeta_monai.Explainer` gives the same gradients with the
    memory of one window batch.

    Args:
        network: any network; its mode is not changed, so call ``network.eval()``.
        target: a target, a name or config of one, or a list of them; their scores are the columns, in order.
        inferer: a callable ``(image, network, *args, **kwargs)`` such as MONAI's; None: the network itself.
        prediction: raw network output (B, classes, …) for the unperturbed image, on which masks are frozen.
        output: key of one of several outputs, see `esegeta_monai.engine.network.outputs.select_output`.
        case: further information on the case for targets (class names, masks, affine, head). Without a head, `freeze`
            determines it from the network's last operations and the range of its output.

    Raises:
        UsageError: no such target.

    Example:
        >>> from esegeta_monai.targets import MultiClassMask
        >>> network = nn.Conv2d(1, 2, 1)
        >>> wrapper = TargetWrapper(network, [MultiClassMask(0), MultiClassMask(1)]).freeze(torch.rand(1, 1, 4, 4))
        >>> wrapper(torch.rand(3, 1, 4, 4)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        target: Any,
        inferer: Callable[..., Any] | None = None,
        *,
        prediction: Tensor | Mapping[Any, Any] | Sequence[Any] | None = None,
        output: int | str | None = None,
        case: Case | None = None,
    ) -> None:
        super().__init__()
        self.network, self.inferer, self.output = network, inferer, output
        self.targets, self.case = TARGETS.create_all(target), case or Case()
        self.scores: list[list[Score]] = []
        if prediction is not None:
            self._bind(select_output(prediction, output).detach(), self.case)

    def freeze(self, image: Tensor, *args: Any, **kwargs: Any) -> TargetWrapper:
        """Freeze all masks on the prediction of ``image`` (B, C, *spatial), separately for each case of a batch.

        If ``case`` has no affine, that of a MetaTensor is used.

        Raises:
            TargetError: a target does not fit the prediction.
        """
        affine = getattr(image, "affine", None)
        case = self.case
        if case.affine is None and affine is not None:
            case = dataclasses.replace(case, affine=affine[0] if affine.ndim == 3 else affine)
        with torch.no_grad():
            prediction = self._predict(image, *args, **kwargs)
        for target in (t for t in self.targets if t.layer is None):
            need_class_axis(prediction[0], image.ndim - 1, target)
        if case.head == Head():
            case = dataclasses.replace(case, head=self._head(image, prediction, args, kwargs))
        self._bind(prediction, case)
        return self

    def _head(self, image: Tensor, prediction: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Head:
        """Determine what the prediction (B, K, …) of images (B, C, *spatial) is.

        Raises:
            NetworkError: the network fails on one image.
        """
        own = () if self.inferer is not None else args
        named = {} if self.inferer is not None else kwargs
        model = Model(self.network, image.device, output=self.output, args=own, kwargs=named)
        plain = image.as_subclass(Tensor)[0].to(model.dtype)

        def evidence() -> HeadEvidence:
            with evaluating(self.network, image.device):
                return evidence_of(
                    small_sample(model, plain, plan_windows(as_inferer(None), plain.shape[1:], plain.dtype))
                )

        head, result = find_head(prediction.detach().transpose(0, 1), None, Postprocessing(), evidence)
        if result.verdict == "warned":
            logger.warning(result.text)
        return head

    def forward(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute scores (B, K) of images (B, C, *spatial); further arguments go to the inferer or the network.

        A batch of another size than the frozen one consists of copies of one case and requires masks of a single case.

        Raises:
            TargetError: several images before any mask was frozen, or a batch that does not match the frozen one.
        """
        if not self.scores:
            if len(image) > 1:
                raise TargetError(
                    f"{len(image)} images in the first call, so it is not known which one is unperturbed: call "
                    "freeze(image) first"
                )
            self.freeze(image, *args, **kwargs)
        if len(self.scores) not in (1, len(image)):
            raise TargetError(
                f"masks are frozen for {len(self.scores)} cases, but {len(image)} images are given: a method that "
                "repeats its images needs one case at a time, frozen by freeze(image[i:i+1])"
            )
        prediction = self._predict(image, *args, **kwargs)
        if len(self.scores) == 1:
            return torch.stack([s.value(s.crop(prediction)) for s in self.scores[0]], 1)
        rows = [[s.value(s.crop(p)) for s in scores] for scores, p in zip(self.scores, prediction)]
        return torch.stack([torch.stack(row) for row in rows])

    def _bind(self, prediction: Tensor, case: Case) -> None:
        scores = [[s for t in self.targets for s in t.bind(p, case)] for p in prediction]
        if len({len(row) for row in scores}) > 1:
            raise TargetError("a target gives some cases more scores than others: freeze one case at a time")
        self.scores = scores

    def _predict(self, image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        image = image.as_subclass(Tensor)
        if self.inferer is None:
            return batch_first(select_output(self.network(image, *args, **kwargs), self.output, image.ndim), len(image))
        return select_output(self.inferer(image, self._window, *args, **kwargs))

    def _window(self, window: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # MONAI's sliding window multiplies its predictor's output in place, which a softmax or sigmoid at the end of
        # the network needs unchanged for its backward pass
        output = select_output(self.network(window, *args, **kwargs), self.output, window.ndim)
        return batch_first(output, len(window)).clone()
