"""A case after its prediction: the network, the image, its windows and the prediction."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from monai.inferers import SliceInferer, SlidingWindowInferer, SlidingWindowInfererAdapt
from torch import Tensor, nn

from esegeta_monai.engine.checks.base import CheckResult, small_sample
from esegeta_monai.engine.checks.head import HeadEvidence, evidence_of, find_head
from esegeta_monai.engine.checks.network import check_network_once
from esegeta_monai.engine.head import Head
from esegeta_monai.engine.layer_maps import LayerOutput
from esegeta_monai.engine.member_score import MembersScore, mean_probability
from esegeta_monai.engine.network.model import Model, halved, out_of_memory, select_output
from esegeta_monai.engine.network.state import evaluating, frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.engine.score import Case, Score
from esegeta_monai.engine.window_loop import WindowedNetwork
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.errors import EsegetaError, InputError, NetworkError, TargetError, UsageError
from esegeta_monai.explain.case import CaseInput, to_device
from esegeta_monai.explain.formats import choose_format
from esegeta_monai.explain.outcomes import BoundTarget
from esegeta_monai.explain.pair import NetworkPair
from esegeta_monai.explain.record import tensor_hash
from esegeta_monai.explain.settings import Settings
from esegeta_monai.targets.base import Target, need_class_axis
from esegeta_monai.targets.difference import Difference, first_of
from esegeta_monai.utils.images import check_contents, check_image
from esegeta_monai.utils.tensors import all_finite

__all__ = ["Prediction"]

logger = logging.getLogger("esegeta_monai")


class Prediction:
    """A case and its unperturbed prediction, from which targets and objectives are built.

    Args:
        settings: settings of the explainer.
        case: one image; the entries that all its maps share are written to its ``record``.
        layer: dotted name of a layer whose output replaces the prediction; None: the prediction.

    Attributes:
        model: the network, called with batches of windows.
        image: (C, *spatial) on the volume device.
        plan: the windows.
        prediction: (K, *out), by the user's own inferer; the mean of probabilities where an ensemble averages these.
        predicted: what the engine reads: ``prediction``, or those of the members (M·K, *out) where these are averaged
            as probabilities.
        notes: warnings.
        head: what the prediction is.

    Raises:
        EsegetaError: the image or the prediction cannot be explained.
    """

    def __init__(self, settings: Settings, case: CaseInput, layer: str | None = None) -> None:
        self.settings, self.case = settings, case
        self._check_image()
        device = settings.device
        if settings.inputs_as is not None and not case.channels:
            raise UsageError(f"inputs_as={settings.inputs_as!r} needs names: give image={{name: tensor, ...}}")
        self.model = Model(
            settings.network if layer is None else LayerOutput(settings.network, layer, axes=settings.layer_axes),
            device,
            output=settings.output if layer is None else None,
            amp=settings.amp,
            amp_kwargs=dict(settings.amp_kwargs),
            inputs=dict(case.channels),
            args=[to_device(a, device) for a in case.args],
            kwargs={k: to_device(v, device) for k, v in case.kwargs.items()},
            members=getattr(settings.inferer, "members", ()),
            inputs_as=settings.inputs_as,
            layer_axes=settings.layer_axes if layer is None else None,
        )
        self.model.preferred = settings.postprocessing.keys
        if layer is None and case.choice is not None:
            self.model.output, self.model.choice = case.choice.key, case.choice
        self.image = case.image.as_tensor().detach().to(settings.volume_device, self.model.dtype)
        case.record = {
            "network_grid": list(self.image.shape[1:]),
            "network_affine": torch.as_tensor(case.image.affine).double().tolist(),
            "image_sha256": tensor_hash(self.image),
        }
        self._same_everywhere()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.plan = plan_windows(settings.inferer, self.image.shape[1:], self.model.dtype)
        self._refuse_missing_axis()
        self._largest_batch: int | None = None
        """Windows that fit into memory together, once more of them did not."""
        self.notes = [str(w.message) for w in caught]
        for text in self.notes:
            logger.warning(text)
        self.model.repeats = self.plan.whole
        # with several calls, each is one pass of the inner inferer: the whole one would make all of them again
        one = getattr(settings.inferer, "single", None) if self.plan.calls else settings.inferer
        if self.plan.whole and one is not None and type(one).__name__ != "SimpleInferer":
            self.model.inferer = one
        self._check_network()
        self._choose_format()
        self.predicted = self.prediction = self._predict()
        self._note_changed_settings()
        self.average: Any = getattr(settings.inferer, "average", "output") if self.plan.apart else "output"
        if self.average != "output":
            self.prediction = self._mean_probability()
        if not all_finite(self.prediction):
            whose = "given prediction" if case.prediction is not None else "prediction"
            raise NetworkError(f"the {whose} has values that are NaN or infinite: there is nothing to explain")
        self._check_values()
        self._note_disturbed()
        self.head = Head()
        if layer is None:
            self._note_output()
            self.head = self._find_head()

    def bind(self, targets: Sequence[Target]) -> Iterator[BoundTarget]:
        """Yield each target's scores, or the error that binding it raised."""
        context = self._context
        if tuple(self.prediction.shape[1:]) != tuple(self.image.shape[1:]):
            context = dataclasses.replace(context, affine=None)
        for target in targets:
            try:
                if self.pair and not isinstance(target, Difference):
                    raise TargetError(
                        f"{type(target).__name__} explains one network, and two are given (NetworkPair): explain "
                        "one of them, or use Difference(target)"
                    )
                if target.layer is None:
                    need_class_axis(self.prediction, self.image.ndim, target)
                for score in target.bind(self.prediction, context):
                    yield BoundTarget(target, self._of_members(score))
            except EsegetaError as error:
                yield BoundTarget(target, None, error)

    def _of_members(self, score: Score) -> Score:
        """Return a score of the mean probability as a function of the members' predictions; any other unchanged."""
        if self.average == "output":
            return score
        return MembersScore(score, self.plan.member_weights, self.average, len(self.prediction))

    def _mean_probability(self) -> Tensor:
        """Return the mean probability (K, *out) of the members' predictions (M·K, *out).

        Raises:
            InputError: a given prediction does not have the channels of all members.
        """
        members = self.plan.member_count
        if len(self.predicted) % members:
            raise InputError(
                f"the given prediction has {len(self.predicted)} channels for {members} members whose probabilities "
                "are averaged: give the raw outputs of the members one after the other, or leave it out"
            )
        weights = self.plan.member_weights
        return mean_probability(self.predicted.double(), members, weights, self.average).to(self.predicted)

    def objective(self, scores: Sequence[Score]) -> Objective:
        """Return the objective F of this case, with one value per score."""
        settings, condition = self.settings, self.case.condition
        window_batch = settings.window_batch or (4 if self.plan.whole else self.plan.batch_size)
        if self._largest_batch is not None:
            window_batch = min(window_batch, self._largest_batch)
        if self._mixes_rows:
            window_batch = 1
        return Objective(
            self.model,
            self.image,
            self.plan,
            scores,
            self.predicted,
            seed=settings.seed,
            condition=None if condition is None else condition.to(self.image),
            case=self._context,
            context=RunContext(processes=settings.processes, window_batch=window_batch, local=settings.local),
        )

    def infer(self, image: Tensor) -> Tensor:
        """Return the prediction (K, *out) at an image (C, *spatial) by the user's own inferer, without autocast.

        Where members are kept apart it has M·K channels.
        """
        model = self.model.without_autocast()
        if self.plan.calls:
            return self._blended(model, image)

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return model(x.to(model.device), coordinates=args[0] if args else None, condition=kwargs.get("condition"))

        inferer, kwargs, changes = self._inference()
        settings = self.settings
        running = evaluating(settings.network, settings.device, model.memory_format)
        with running, torch.no_grad(), _changed(settings.inferer, changes):
            return select_output(inferer(image[None], call, **kwargs))[0].detach().to(self.image)

    def _inference(self) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
        """Return the function that predicts an image, its keywords, and the attributes of the inferer to set for it."""
        user, model, condition = self.settings.inferer, self.model, self.case.condition
        inferer = user if model.inferer is None else (lambda x, network, **kw: network(x, **kw))
        kwargs = {} if condition is None else {"condition": condition[None].to(self.image)}
        changes: dict[str, Any] = {"sw_device": user.sw_device or model.device} if hasattr(user, "sw_device") else {}
        if hasattr(user, "sw_batch_size"):
            changes["sw_batch_size"] = self._largest_batch or self.settings.window_batch or user.sw_batch_size
            if self._mixes_rows:
                changes["sw_batch_size"] = 1
        return inferer, kwargs, changes

    def _check_network(self) -> None:
        """Check the network and add the results to those of the case; log the warnings."""
        settings, case = self.settings, self.case
        self.model.copies_input = True
        if not settings.checks:
            return
        model = copy.copy(self.model)
        model.network, model.output, model.inferer = settings.network, settings.output, None
        condition = None if case.condition is None else case.condition.to(self.image)
        once = settings.checks == "once"
        results = check_network_once(model, self.image, self.plan, condition=condition, ignore_weights=once)
        for check in results:
            if self._verdict(check.name) is None:  # a case is predicted once per layer
                case.checks.append(check)
                if check.verdict == "warned":
                    logger.warning(check.text)
        self.model.mixes_rows = self._mixes_rows
        self.model.copies_input = self._verdict("input") != "passed"

    def _choose_format(self) -> None:
        """Choose the memory format of the windows, and record it."""
        settings = self.settings
        condition = None if self.case.condition is None else self.case.condition.to(self.image)
        choice = choose_format(
            settings.memory_format, self.model, self.image, self.plan, condition, settings.processes, settings.formats
        )
        self.model.memory_format = choice.used
        self.case.record["memory_format"] = choice.entry()

    def _note_disturbed(self) -> None:
        """Note where the inferer or the given prediction differs from the prediction of this image alone."""
        given, cause = self.case.prediction, self._disturbance
        batch = getattr(self.settings.inferer, "sw_batch_size", 1)
        if cause is None or isinstance(self.model.network, LayerOutput):
            return
        if "mixes" in cause and batch > 1 and len(self.plan) > 1:
            text = (
                "the network mixes the windows of a batch: the explained prediction has one window per pass and "
                f"differs from that of the inferer with sw_batch_size={batch}; predict with sw_batch_size=1"
            )
        elif given is None or _close(given.detach().to(self.predicted), self.predicted):
            return
        else:
            text = f"{cause}: the given prediction is not that of this image, unchanged and alone, which is explained"
        self.notes.append(text)
        logger.warning(text)

    def _note_changed_settings(self) -> None:
        """Note settings of torch that the network changes in its pass; they have been restored after each."""
        for what in sorted(self.model.disturbs):
            text = f"the network changes {what} in its forward pass; it is set back after each pass"
            self.notes.append(text)
            logger.warning(text)

    def _check_image(self) -> None:
        """Check the image of the case; a refusal is also a check of it."""
        image, where = self.case.image.detach().cpu(), f"image {self.case.index}"
        try:
            check_image(image, where)
            if not self.settings.constant_images:
                check_contents(image, where)
        except InputError as error:
            self.case.checks.append(CheckResult("finite", "refused", str(error)))
            raise

    def _check_values(self) -> None:
        """Add the check of the values of image and prediction, which are finite, to those of the case."""
        known = any(check.name == "finite" for check in self.case.checks)  # a case is predicted once per layer
        if self.settings.checks and not known:
            self.case.checks.append(CheckResult("finite", "passed", "image and prediction are finite"))

    @property
    def _mixes_rows(self) -> bool:
        """True if the images of a batch influence each other, so that windows run one by one."""
        return self._verdict("rows") == "handled"

    @property
    def _disturbance(self) -> str | None:
        """Why a given prediction may not be that of this image alone; None: it is used as it is."""
        handled = {check.name: check.value for check in self.case.checks if check.verdict == "handled"}
        if handled.get("rows") is not None:  # None: it accepts only one window per pass
            return "the network mixes the images of a batch"
        if "input" in handled:
            return "the network writes into its input, so overlapping windows change each other"
        return None

    def _verdict(self, name: str) -> str | None:
        """Return the verdict of a check of the network, or None if it has not run."""
        return next((check.verdict for check in self.case.checks if check.name == name), None)

    @property
    def _context(self) -> Case:
        affine = torch.as_tensor(self.case.image.affine).double().cpu()
        names = self.settings.class_names, self.settings.channel_names
        return Case(affine, self.case.data, *names, self.head, 2 if self.pair else 1)

    @property
    def pair(self) -> bool:
        """True if two networks are compared: their predictions are stacked along the channels."""
        return isinstance(self.settings.network, NetworkPair)

    @property
    def decided_by(self) -> Tensor:
        """The prediction (K, *out) that decides classes: that of the first network of a pair."""
        return first_of(self.prediction) if self.pair else self.prediction

    def _note_output(self) -> None:
        """Record which of several outputs is explained, and warn of an output of integers."""
        if self.model.integers is not None:
            kind = str(self.model.integers).removeprefix("torch.")
            text = (
                f"the network's output consists of integers ({kind}), such as class numbers after an argmax: their "
                "sums and differences are no scores of a class; explain the output before it"
            )
            self._note(CheckResult("outputs", "warned", text))
            return
        choice, given = self.model.choice, self.settings.output
        if choice is None or given is not None:
            text = "the network returns one tensor" if given is None else f"output={given!r}, as given"
            self._note(CheckResult("outputs", "passed", text))
            return
        self.case.record["output"] = choice.key
        if choice.reason is not None:
            self._note(CheckResult("outputs", "handled", f"output={choice.key!r} is explained, since {choice.reason}"))
            return
        text = (
            f"the network returns several tensors: {choice.listed}; output={choice.key!r} is explained, because none "
            "was chosen: choose by output=KEY (--network-output KEY)"
        )
        self._note(CheckResult("outputs", "warned", text))

    def _find_head(self) -> Head:
        """Find out what the prediction is, and record it.

        Raises:
            EsegetaError: the user's statement contradicts the prediction, or the bundle squashes it twice.
        """
        settings = self.settings
        if self.average != "output":
            text = f"the members' {self.average} is averaged, so the prediction consists of probabilities"
            self._note(CheckResult("head", "passed", text))
            kind: Any = f"{self.average} inside"
            head = Head(kind, True, (text,), settings.postprocessing)
            self.case.record["head"] = head.to_json()
            return head

        def evidence() -> HeadEvidence:
            model = copy.copy(self.model)
            model.inferer = None
            if isinstance(settings.network, NetworkPair):  # whose last operation stacks two outputs
                model.network = settings.network.first
            condition = None if self.case.condition is None else self.case.condition.to(self.image)
            try:
                with evaluating(settings.network, settings.device):
                    return evidence_of(small_sample(model, self.image, self.plan, condition))
            except Exception as error:  # a network may raise anything on a window that its inferer would not give it
                return HeadEvidence(failed=" ".join(str(error).split())[:200] or type(error).__name__)

        head, result = find_head(self.decided_by, settings.head, settings.postprocessing, evidence)
        self._note(result)
        self.case.record["head"] = head.to_json()
        return head

    def _note(self, result: CheckResult) -> None:
        """Add the result of a check of the case in place of an earlier one."""
        self.case.checks = [*(c for c in self.case.checks if c.name != result.name), result]
        if result.verdict == "warned":
            logger.warning(result.text)

    def _same_everywhere(self) -> None:
        known = self.settings.processes.gather((self.case.record["image_sha256"], str(self.settings.record["network"])))
        if len(set(known)) > 1:
            raise UsageError(
                f"case {self.case.index}: the ranks hold different images or networks, but distributed=True computes "
                "one case together: give every rank the same, or let each rank explain its own cases with "
                "distributed=False"
            )

    def _refuse_missing_axis(self) -> None:
        """Refuse a volume that lacks its batch or channel axis.

        It looks like a 2D image, and torch's 3D convolutions accept it as one image without a batch: maps would be
        wrong, or fail with an error that does not name the cause. Networks that add the axis themselves may get a 2D
        image, so the check looks at the input of the first 3D convolution.

        Raises:
            InputError: a 3D convolution gets an input with four axes.
        """
        solid = [m for m in self.model.network.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))]
        if self.image.ndim != 3 or not solid or getattr(self.settings.inferer, "with_coord", False):
            return

        def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _Reached(args[0].ndim)

        condition = None if self.case.condition is None else self.case.condition[None].to(self.image)
        hooks = [module.register_forward_pre_hook(stop) for module in solid]
        try:
            with torch.no_grad(), frozen(self.settings.network):
                self.model(self.image[None].to(self.model.device), condition=condition)
        except _Reached as first:
            if first.args == (4,):
                raise InputError(
                    f"image {self.case.index} has shape {tuple(self.image.shape)}, so it is 2D with "
                    f"{len(self.image)} channel(s), and the network's convolutions are 3D: give (B, C, *spatial) with "
                    "all its axes (image[None]; EnsureChannelFirstd adds a channel axis)"
                ) from None
        finally:
            for hook in hooks:
                hook.remove()

    def _predict(self) -> Tensor:
        """Return the unperturbed prediction (K, *out) by the user's own inferer."""
        settings, case, model = self.settings, self.case, self.model
        if case.prediction is not None and not isinstance(model.network, LayerOutput):
            if case.prediction.is_complex():
                raise InputError("the given prediction has complex values: give the network's own raw output")
            if self._disturbance is None:
                return case.prediction.detach().to(self.image)
        if self.plan.calls:
            return self._blended(self.model, self.image)
        user, ranks, windows = settings.inferer, settings.processes, len(self.plan)
        inferer, kwargs, changes = self._inference()
        shared = ranks.size > 1 and type(user) in (SlidingWindowInferer, SlidingWindowInfererAdapt, SliceInferer)
        own = set(ranks.share(range(windows)))
        seen = 0

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[()]:
            """Predict windows; blending is linear in them, so each rank blends its own and the results are summed."""
            nonlocal seen
            here = [j for j in range(len(x)) if not shared or seen + j in own]
            seen += len(x)
            if not here:
                return ()  # no output: nothing is blended
            coordinates, condition = args[0] if args else None, kwargs.get("condition")
            if len(here) == len(x):
                return model(x.to(model.device), coordinates=coordinates, condition=condition)
            part = model(
                x[here].to(model.device), coordinates=_some(coordinates, here), condition=_some(condition, here)
            )
            out = part.new_zeros((len(x), *part.shape[1:]))
            out[here] = part
            return out

        if shared:
            changes["buffer_steps"] = 0  # a buffer needs an output of every batch

        def infer() -> Tensor | None:
            """Return this rank's part of the prediction, None if it has no window."""
            nonlocal seen
            if shared and not own:
                return None
            for _ in range(2):
                seen = 0
                prediction = select_output(inferer(self.image[None], call, **kwargs))[0].detach()
                if not shared or seen == windows:
                    return prediction
                # SlidingWindowInfererAdapt ran out of memory and started again, so windows were counted twice; the
                # second attempt counts correctly, because the inferer remembers the device that works
            raise NetworkError(
                f"the inferer requested {seen} windows instead of {windows}, so ranks cannot share them: give it "
                "device='cpu', which has more memory for the prediction"
            )

        blended = _Blended()
        together = ranks.summed([blended]) if shared else nullcontext()
        running = evaluating(settings.network, settings.device, model.memory_format)
        with running, torch.no_grad(), together:
            blended.prediction = self._halving(infer, changes)
        assert blended.prediction is not None
        return blended.prediction.to(self.image)

    def _halving(self, infer: Callable[[], Tensor | None], changes: dict[str, Any]) -> Tensor | None:
        """Predict with the changes of `_inference`; halve the window batch for as long as memory runs out.

        Raises:
            MethodError: memory runs out with one window.
        """
        while True:
            try:
                with _changed(self.settings.inferer, changes):
                    return infer()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                tried = min(changes.get("sw_batch_size", 1), len(self.plan))
                smaller = halved(tried, self.plan.roi, error)
            text = f"out of memory with {tried} windows per batch: predicted with {smaller}"
            logger.warning(text)
            self.notes.append(text)
            self._largest_batch = changes["sw_batch_size"] = smaller

    def _blended(self, model: Model, image: Tensor) -> Tensor:
        """Return the prediction (K, *out) of an ensemble or of mirrored views: its windows, blended here."""
        condition = None if self.case.condition is None else self.case.condition.to(self.image)
        context = RunContext(processes=self.settings.processes, window_batch=self.settings.window_batch)
        network = WindowedNetwork(model, image, self.plan, condition=condition, context=context)
        with evaluating(self.settings.network, self.settings.device), torch.inference_mode():
            out_roi = tuple(network.run(network.window(0), [0]).shape[2:])
            grid = OutputGrid(self.plan, out_roi, self.image.dtype, self.image.device)
            objective = Objective(model, image, self.plan, condition=condition, context=context, grid=grid)
            return objective.predict_all()


class _Reached(Exception):  # noqa: N818 - no error: it ends a pass at the first 3D convolution
    """Raised with the number of axes of the convolution's input."""


def _close(a: Tensor, b: Tensor) -> bool:
    """Return True if two predictions are equal except for rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-4 * float(b.abs().max()))


def _some(values: Any, which: Sequence[int]) -> Any:
    """Return the entries of a further input of a batch of windows that belong to the windows ``which``."""
    return values[which] if isinstance(values, Tensor) else None if values is None else [values[j] for j in which]


@contextmanager
def _changed(inferer: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes of an inferer inside the block and restore them afterwards."""
    before = {name: getattr(inferer, name) for name in values}
    try:
        vars(inferer).update(values)
        yield
    finally:
        vars(inferer).update(before)


@dataclass
class _Blended:
    """A prediction (K, *out), or one rank's part of it."""

    prediction: Tensor | None = None
    summed: ClassVar[tuple[str, ...]] = ("prediction",)
