"""Runs methods on the cases of a batch: the one entrance that all doors share.

explainer = Explainer(network, inferer=SlidingWindowInferer((96, 96, 96), 4, 0.5, "gaussian"))
for attribution in explainer(image, methods=[Saliency()], targets=[MultiClassMask(1)]):
    ...
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from monai.data import MetaTensor, decollate_batch
from torch import Tensor, nn

from esegeta_monai.configurable import json_ready
from esegeta_monai.errors import EsegetaError, InputError, MethodError, MethodTimeout, NetworkError, UsageError
from esegeta_monai.layers import LayerOutput
from esegeta_monai.methods.base import METHODS, Explained, Method, run_together
from esegeta_monai.monitor import Monitor
from esegeta_monai.network import Model, check_network, frozen, is_scripted, select_output, unwrap
from esegeta_monai.objective import Objective, Request, View
from esegeta_monai.storage import check_image, versions
from esegeta_monai.targets.base import TARGETS, Case, Score, Target
from esegeta_monai.windows import WindowPlan, as_inferer, plan_windows

__all__ = ["Attribution", "Explainer"]

logger = logging.getLogger("esegeta_monai")

OnError = Literal["raise", "record"]

MEASURED = (
    *("status", "sum", "completeness_gap", "blend_deviation", "value", "baseline_value"),
    *("predicted_class", "predicted_class_name", "predicted_probability"),
    *("windows_used", "window_passes", "window_batch", "seconds", "peak_memory_bytes"),
)
"""What a record has besides what is known beforehand; None where the method, or the network, has no such thing."""

HOW_NOT_WHAT = ("progress", "sw_batch_size", "sw_device", "device", "cpu_thresh", "buffer_steps", "buffer_dim")
"""Parameters of MONAI's inferers that change where and how fast a prediction is computed, not what it is."""

Skip = Callable[["Attribution"], bool]


@dataclass
class Attribution:
    """One map: what a method says about a target of a case.

    Attributes:
        map: MetaTensor (C, *spatial) on the grid of the image, raw values in the network's dtype; None where there is
            none (``record["status"]`` says why).
        method, target: the objects; a target that asks for several scores gives several attributions.
        case: index of the image in the batch.
        record: JSON-ready: status, parameters, sums, completeness gap, windows, seconds, memory, versions, warnings.
        label: the target's name with its class, for files and pictures.
        mask: bool MetaTensor (1, *spatial) of the target's voxels on the prediction's grid; None for class scores.
        input: name of the image input, where a network has several.
        error: the exception of a failed method.
    """

    map: MetaTensor | None
    method: Method
    target: Target
    case: int
    record: dict[str, Any]
    label: str
    mask: MetaTensor | None = None
    input: str | None = None
    error: Exception | None = None

    @property
    def status(self) -> str:
        """ok, zero, empty_target, failed or timeout."""
        return self.record["status"]


@dataclass
class _CaseInput:
    """One case of a batch, on the network's grid."""

    index: int
    image: MetaTensor
    prediction: Tensor | None
    data: Mapping[str, Any]
    condition: Tensor | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    """What the records of all its maps share."""


class _CaseModel(Model):
    """The network with one case's further inputs.

    Where it sees whole images, a further input of batch length 1 is repeated for each image of a batch, as the network
    expects; under a sliding window it is passed as it is, as MONAI does.
    """

    repeats = False

    def __call__(self, x: Tensor, **more: Any) -> Tensor:
        if not self.repeats:
            return super().__call__(x, **more)
        args, kwargs = self.args, self.kwargs
        self.args = tuple(_repeated(v, len(x)) for v in args)
        self.kwargs = {k: _repeated(v, len(x)) for k, v in kwargs.items()}
        try:
            return super().__call__(x, **more)
        finally:
            self.args, self.kwargs = args, kwargs


@dataclass
class _Bound:
    """A target and one of its scores, or the error that binding it gave."""

    target: Target
    score: Score | None
    error: Exception | None = None
    label: str = field(init=False)

    def __post_init__(self) -> None:
        self.label = self.score.label if self.score is not None else self.target.name or type(self.target).__name__


class Explainer:
    """Explains the predictions of a network.

    The image is never modified, and the network leaves as it came: weights, training flags, hooks, ``requires_grad``.

    Args:
        network: any `torch.nn.Module`; under (Distributed)DataParallel the module inside is used.
        inferer: as the prediction uses it; None: the network sees the whole image.
        device: where windows are computed; must be the network's. None: where the network is.
        amp: autocast (float16 on CUDA, bfloat16 elsewhere, or ``amp_kwargs["dtype"]``) for methods that allow it.
        volume_device: where volumes live; None: as the inferer's ``device`` says, else ``device``.
        output: which output is explained, where the network returns several (key or index).
        class_names: class number to name, for targets by name and for records.
        channel_names: names of the image's channels, for records.
        window_batch: windows a pass; None: the inferer's ``sw_batch_size``, 4 for other inferers.
        seed: of every random draw.
        progress: a progress bar with the remaining time for each group of methods.
        time_limit: seconds a method; then it ends as ``timeout`` and the next one begins.
        on_error: ``"raise"``, or ``"record"``: what fails (a method, a target, a case) gives an attribution without map
            and the rest goes on.

    Raises:
        NetworkError: half-precision weights, a network on another device, or one built under ``inference_mode``.

    Example:
        >>> from esegeta_monai.methods import Saliency
        >>> from esegeta_monai.targets import ClassScore
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> explainer = Explainer(network)
        >>> found, = explainer(torch.rand(1, 1, 4, 4), methods=[Saliency()], targets=[ClassScore(1)])
        >>> tuple(found.map.shape), found.status
        ((1, 4, 4), 'ok')
    """

    def __init__(
        self,
        network: nn.Module,
        inferer: Any = None,
        device: torch.device | str | None = None,
        amp: bool = False,
        *,
        amp_kwargs: Mapping[str, Any] | None = None,
        volume_device: torch.device | str | None = None,
        output: int | str | None = None,
        class_names: Mapping[int, str] | None = None,
        channel_names: Sequence[str] | None = None,
        window_batch: int | None = None,
        seed: int = 0,
        progress: bool = False,
        time_limit: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.network = unwrap(network)
        check_network(self.network)
        if any(p.is_inference() for p in self.network.parameters()):
            raise NetworkError(
                "the network was built inside torch.inference_mode(), so its flags cannot be set and put back: build "
                "it outside, or under torch.no_grad()"
            )
        self.inferer = as_inferer(inferer)
        at = {p.device for p in self.network.parameters()}
        self.device = torch.device(device) if device is not None else next(iter(at), torch.device("cpu"))
        if any(p.type != self.device.type for p in at):
            raise NetworkError(
                f"the network is on {', '.join(sorted(map(str, at)))}, but device={str(self.device)!r}: move it first, "
                f"network.to({str(self.device)!r})"
            )
        where = volume_device or getattr(self.inferer, "device", None) or self.device
        self.volume_device = torch.device(where)
        self.amp, self.amp_kwargs, self.output = bool(amp), dict(amp_kwargs or {}), output
        self.class_names = {int(k): v for k, v in (class_names or {}).items()}
        self.channel_names = list(channel_names or [])
        self.window_batch, self.seed = window_batch, int(seed)
        # what the weights do not tell, such as the slope of a LeakyReLU; object addresses aside
        self._structure = hashlib.sha256(re.sub(r" at 0x\w+", "", repr(self.network)).encode()).hexdigest()
        self.progress, self.time_limit = progress, time_limit
        if on_error not in ("raise", "record"):
            raise UsageError(f"on_error={on_error!r}: give 'raise' or 'record'")
        self.on_error = on_error

    def __call__(
        self,
        image: Tensor | Mapping[str, Tensor],
        methods: Any,
        targets: Any,
        *,
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        prediction: Any = None,
        network_args: Sequence[Any] = (),
        network_kwargs: Mapping[str, Any] | None = None,
        skip: Skip | None = None,
    ) -> Iterator[Attribution]:
        """Explains every case of a batch by every method for every target.

        Args:
            image: tensor or MetaTensor (B, C, *spatial). A mapping of names to such tensors explains several image
                inputs together, a map each: the first is passed to the network positionally, the others by name.
            methods: methods, names or configs.
            targets: targets, names or configs.
            data: the case's data dictionary (a list of them for a batch), where targets find masks and labels.
            prediction: the network's raw output for the batch (B, K, …), where it is known already.
            network_args, network_kwargs: further inputs of the network, passed through. A tensor whose first axis is
                as long as the batch is cut to the case; ``condition`` is cut to the windows too, as MONAI does.
            skip: asked before anything is computed, with an attribution that has no map yet and whose record says what
                would be computed; True leaves it out.

        Yields:
            `Attribution`, case by case.

        Raises:
            EsegetaError: a wrong name or parameter; with ``on_error="raise"`` anything that goes wrong.
        """
        chosen = METHODS.create_all(methods)
        wanted = TARGETS.create_all(targets)
        refused = self._refused(chosen)
        if refused and self.on_error == "raise":
            raise next(iter(refused.values()))
        inputs = dict(image) if isinstance(image, Mapping) else {}
        if inputs:
            image = _joined(inputs)
        assert isinstance(image, Tensor)
        if image.ndim not in (4, 5):
            raise InputError(f"image must be (B, C, *spatial) in 2D or 3D, got shape {tuple(image.shape)}")
        channels = {n: v.shape[1] for n, v in inputs.items()}
        for case in self._cases(image, prediction, data, network_args, network_kwargs or {}):
            told: set[tuple[int, int]] = set()
            try:
                for attribution in self._explain_case(case, chosen, wanted, channels, refused, skip):
                    told.add((id(attribution.method), id(attribution.target)))
                    yield attribution
            except Exception as error:
                if self.on_error == "raise":
                    raise
                for method in chosen:
                    for target in (t for t in wanted if (id(method), id(t)) not in told):
                        bound = _Bound(target, None, error)
                        yield self._failed(method, bound, case, self._record(method, bound, None, case), error)

    # -- cases --------------------------------------------------------------------------------------------------

    def _cases(
        self, image: Tensor, prediction: Any, data: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[_CaseInput]:
        output = None if prediction is None else select_output(prediction, self.output)
        n = len(image)
        several = list(data) if isinstance(data, Sequence) else [data or {}] * n
        condition = kwargs.get("condition")
        if len(several) != n:
            raise UsageError(f"data has {len(several)} entries for {n} images")
        for i, one in enumerate(cases_of(image)):
            yield _CaseInput(
                i,
                one,
                None if output is None else output[i],
                several[i],
                None if condition is None else torch.as_tensor(condition[i]).as_subclass(Tensor),
                [_of_case(a, i, n) for a in args],
                {k: _of_case(v, i, n) for k, v in kwargs.items() if k != "condition"},
            )

    def _explain_case(
        self,
        case: _CaseInput,
        methods: Sequence[Method],
        targets: Sequence[Target],
        channels: dict[str, int],
        refused: Mapping[int, Exception],
        skip: Skip | None,
    ) -> Iterator[Attribution]:
        layers = list(dict.fromkeys(t.layer for t in targets))
        if len(layers) > 1:  # a layer takes the place of the prediction
            for layer in layers:
                mine = [t for t in targets if t.layer == layer]
                yield from self._explain_case(case, methods, mine, channels, refused, skip)
            return
        check_image(case.image.detach().cpu(), f"image {case.index}")
        model = self._model(channels, case, layers[0] if layers else None)
        image = case.image.as_tensor().detach().to(self.volume_device, model.dtype)
        case.record = {
            "network_grid": list(image.shape[1:]),
            "network_affine": torch.as_tensor(case.image.affine).double().tolist(),
            "image_sha256": _sha256(image),
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = plan_windows(self.inferer, image.shape[1:], model.dtype)
        notes = [str(w.message) for w in caught]
        for text in notes:
            logger.warning(text)
        model.repeats = plan.whole
        if plan.whole and type(self.inferer).__name__ != "SimpleInferer":
            model.inferer = self.inferer
        prediction = self._prediction(case, image, model)
        todo: dict[tuple[int, ...], list[Method]] = {}
        bound = list(self._bind(targets, prediction, case))
        for method in methods:
            left = []
            for j, b in enumerate(bound):
                record = self._record(method, b, plan, case)
                if skip and skip(Attribution(None, method, b.target, case.index, record, b.label)):
                    continue
                error = refused.get(id(method), b.error)
                if error is not None:
                    yield self._failed(method, b, case, record, error)
                elif b.score is None or b.score.empty:
                    yield self._empty(method, b, case, record)
                elif method.needs_linear and not b.score.linear:
                    yield self._failed(method, b, case, record, _not_linear(method, b))
                else:
                    left.append(j)
            if left:
                todo.setdefault(tuple(left), []).append(method)
        for seen, together in todo.items():
            part = [bound[j] for j in seen]
            with self._modes(), frozen(self.network):
                objective = Objective(
                    model,
                    image,
                    plan,
                    [b.score for b in part if b.score is not None],
                    prediction,
                    seed=self.seed,
                    monitor=Monitor(),
                    condition=None if case.condition is None else case.condition.to(self.volume_device, model.dtype),
                )
            objective.window_batch = self.window_batch or (4 if plan.whole else plan.batch_size)
            if not _shares(together[0]):  # else its sweep compares
                with self._modes(), frozen(self.network):
                    objective.sweep([_Blend()])
            for group in _groups(together):
                yield from self._explain_group(group, objective, part, case, channels, prediction, notes)

    def _explain_group(
        self,
        group: Sequence[Method],
        objective: Objective,
        bound: Sequence[_Bound],
        case: _CaseInput,
        channels: dict[str, int],
        prediction: Tensor,
        notes: Sequence[str],
    ) -> Iterator[Attribution]:
        """Methods that share their passes, in one run of the network."""
        monitor = objective.monitor
        monitor.start(None if self.time_limit is None else self.time_limit * len(group))
        _reset_peak(self.device)
        began = time.monotonic()
        names = ", ".join(m.name or type(m).__name__ for m in group)
        full = group[0].full_precision
        precision = objective.model.full_precision() if full else nullcontext()
        with self._bar(names, group, objective), self._modes(), frozen(self.network), precision:
            results = run_together(group, objective)
        seconds = time.monotonic() - began
        shared = {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": _peak(self.device),
            "windows_used": len(objective.windows),
            "windows_total": len(objective.plan),
            "window_passes": monitor.passes,
            "window_batch": objective.window_batch,
            "warnings": [*notes, *monitor.warnings],
        }
        if len(group) > 1:
            shared["passes_shared_with"] = [m.name for m in group]
        logger.info("case %d: %s took %.1f s, %d window passes", case.index, names, seconds, monitor.passes)
        values = objective.image_values() if any(isinstance(r, Explained) for r in results.values()) else None
        for i, method in enumerate(group):
            outcome = results[i]
            for k, b in enumerate(bound):
                record = self._record(method, b, objective.plan, case)
                record.update(shared)
                record["blend_deviation"] = objective.blend_deviation[k]
                if isinstance(outcome, Exception):
                    yield self._failed(method, b, case, record, outcome)
                    continue
                assert values is not None
                record["value"] = float(values[k])
                if b.target.layer is None:
                    record.update(_predicted(prediction, self.class_names))
                yield from self._finished(method, b, case, record, outcome, k, channels)

    def _finished(
        self,
        method: Method,
        bound: _Bound,
        case: _CaseInput,
        record: dict[str, Any],
        outcome: Explained,
        k: int,
        channels: dict[str, int],
    ) -> Iterator[Attribution]:
        record.update(json_ready(outcome.note(k)))
        values = outcome.maps[k]
        per_input = bool(channels) and values.shape[0] == sum(channels.values())
        parts = dict(zip(channels, values.split(list(channels.values())))) if per_input else {None: values}
        mask = _mask(bound.score, case.image)
        for name, part in parts.items():
            mine = dict(record)
            finite = bool(torch.isfinite(part).all())
            mine["sum"] = float(part.sum(dtype=torch.float64)) if finite else None
            mine["status"] = "ok" if finite and bool(part.any()) else ("zero" if finite else "failed")
            if name is not None:
                mine["input"] = name
            if not finite:
                bad = int((~torch.isfinite(part)).sum())
                error = MethodError(
                    f"{method.name} gave {bad} of {part.numel()} values that are not finite: switch amp off, or choose "
                    "another method for this network"
                )
                yield self._failed(method, bound, case, mine, error)
                continue
            if mine["status"] == "zero":
                mine["warnings"] = [*mine["warnings"], "the map is zero everywhere: the target does not react here"]
            yield Attribution(_like(part, case.image), method, bound.target, case.index, mine, bound.label, mask, name)

    def _failed(
        self, method: Method, bound: _Bound, case: _CaseInput, record: dict[str, Any], error: Exception
    ) -> Attribution:
        if self.on_error == "raise":
            raise error
        record["status"] = "timeout" if isinstance(error, MethodTimeout) else "failed"
        record["reason"] = str(error) if isinstance(error, EsegetaError) else f"{type(error).__name__}: {error}"
        logger.debug("case %d: %s, %s failed", case.index, method.name, bound.label, exc_info=error)
        return Attribution(None, method, bound.target, case.index, record, bound.label, error=error)

    @staticmethod
    def _empty(method: Method, bound: _Bound, case: _CaseInput, record: dict[str, Any]) -> Attribution:
        record["status"] = "empty_target"
        record["reason"] = f"no voxel of the prediction belongs to {bound.label}, so there is nothing to explain"
        return Attribution(None, method, bound.target, case.index, record, bound.label)

    # -- parts --------------------------------------------------------------------------------------------------

    def _model(self, channels: dict[str, int], case: _CaseInput, layer: str | None) -> _CaseModel:
        return _CaseModel(
            self.network if layer is None else LayerOutput(self.network, layer),
            self.device,
            output=self.output if layer is None else None,
            amp=self.amp,
            amp_kwargs=self.amp_kwargs,
            inputs=channels,
            args=[_to(a, self.device) for a in case.args],
            kwargs={k: _to(v, self.device) for k, v in case.kwargs.items()},
        )

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Gradients on and autocast off, whatever the caller (an evaluator, a trainer) has set; `Model` decides."""
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self.device.type, enabled=False):
            yield

    def _prediction(self, case: _CaseInput, image: Tensor, model: Model) -> Tensor:
        """The unperturbed prediction (K, *out) by the user's own inferer."""
        if case.prediction is not None and not isinstance(model.network, LayerOutput):
            return case.prediction.detach().to(self.volume_device, model.dtype)
        inferer = self.inferer if model.inferer is None else (lambda x, network, **kw: network(x, **kw))

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return model(x.to(self.device), coordinates=args[0] if args else None, condition=kwargs.get("condition"))

        kwargs = {} if case.condition is None else {"condition": case.condition[None].to(image.device, image.dtype)}
        sw_device = getattr(self.inferer, "sw_device", None)
        with self._modes(), torch.no_grad(), frozen(self.network):
            if sw_device is None and hasattr(self.inferer, "sw_device"):
                self.inferer.sw_device = self.device
            try:
                out = inferer(image[None], call, **kwargs)
            finally:
                if hasattr(self.inferer, "sw_device"):
                    self.inferer.sw_device = sw_device
        prediction = select_output(out)[0].detach().to(self.volume_device, model.dtype)
        if not bool(torch.isfinite(prediction).all()):
            raise NetworkError("the prediction has values that are NaN or infinite: there is nothing to explain")
        return prediction

    def _bind(self, targets: Sequence[Target], prediction: Tensor, case: _CaseInput) -> Iterator[_Bound]:
        affine = torch.as_tensor(case.image.affine).double().cpu()
        same = tuple(prediction.shape[1:]) == tuple(case.image.shape[1:])
        context = Case(affine if same else None, case.data, self.class_names)
        for target in targets:
            try:
                for score in target.bind(prediction, context):
                    yield _Bound(target, score)
            except EsegetaError as error:
                yield _Bound(target, None, error)

    def _record(self, method: Method, bound: _Bound, plan: WindowPlan | None, case: _CaseInput) -> dict[str, Any]:
        """All that is known before the method runs; what only the run can tell stands as None."""
        score, names = bound.score, self.channel_names
        return {
            **dict.fromkeys(MEASURED),
            "method": type(method).__name__,
            "method_name": method.name,
            "parameters": method.parameters,
            "produces": method.produces,
            "additive": method.additive,
            "signed": method.signed,
            "units": method.units,
            "reference": method.reference,
            "target": type(bound.target).__name__,
            "target_name": bound.label,
            "target_parameters": bound.target.parameters,
            "target_voxels": 0 if score is None else score.voxels,
            "target_sha256": None if score is None else _sha256(score.mask, *[[b.start, b.stop] for b in score.box]),
            "class_index": None if score is None else score.class_index,
            "class_name": None if score is None else score.class_name,
            "channel_names": names if len(names) == case.image.shape[0] else [],
            "coverage": None if plan is None else plan.coverage,
            "windows_total": None if plan is None else len(plan),
            "seed": self.seed,
            "amp": None if method.full_precision else self._autocast,
            "inferer": _described(self.inferer),
            "output": self.output,
            "network": {"name": type(self.network).__name__, "structure_sha256": self._structure},
            **case.record,
            "warnings": [],
            "versions": versions(),
        }

    @property
    def _autocast(self) -> str | None:
        if not self.amp:
            return None
        return str(self.amp_kwargs.get("dtype", torch.float16 if self.device.type == "cuda" else torch.bfloat16))

    def _refused(self, methods: Sequence[Method]) -> dict[int, Exception]:
        """Methods (by id) that this network cannot serve, each with its error."""
        if not is_scripted(self.network):
            return {}
        need = [m for m in methods if m.needs_gradient]
        error = NetworkError(
            f"{', '.join(str(m.name) for m in need)}: gradients are needed, which a TorchScript or TensorRT network "
            "does not give reliably; load the plain PyTorch network, or use a perturbation method such as Occlusion"
        )
        return {id(m): error for m in need}

    @contextmanager
    def _bar(self, names: str, group: Sequence[Method], objective: Objective) -> Iterator[None]:
        if not self.progress:
            yield
            return
        from tqdm import tqdm

        total = sum(m.passes(objective) for m in group)
        with tqdm(total=total, desc=names[:60], unit="window", file=sys.stderr) as bar:
            objective.monitor.on_pass = bar.update
            try:
                yield
            finally:
                objective.monitor.on_pass = None


class _Blend(Request):
    """Asks for nothing: the sweep itself compares the blended windows with the prediction."""

    backward = False

    def see(self, view: View) -> None:
        """Nothing to gather."""

    def result(self) -> None:
        """Nothing."""


def _shares(method: Method) -> bool:
    """Whether a method asks for sweeps over the windows that others can share."""
    return inspect.isgeneratorfunction(type(method).attribute) and not method.full_precision


def _groups(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods in their order; those that can share passes come together, at the place of the first."""
    groups: list[list[Method]] = []
    sharing: list[Method] = []
    for method in methods:
        if _shares(method):
            if not sharing:
                groups.append(sharing)
            sharing.append(method)
        else:
            groups.append([method])
    return groups


def cases_of(image: Tensor) -> list[MetaTensor]:
    """The images (C, *spatial) of a batch (B, C, *spatial), each with its own metadata and trace."""
    if not isinstance(image, MetaTensor):
        return [MetaTensor(one) for one in image]
    if not image.is_batch and image.affine.ndim == 2:
        return [MetaTensor(one, meta=image.meta, applied_operations=image.applied_operations) for one in image]
    return list(decollate_batch(_batch_like(image.as_tensor(), image)))


def _not_linear(method: Method, bound: _Bound) -> MethodError:
    return MethodError(
        f"{method.name} hands relevance down from a linear score, and {bound.label} is not linear in the prediction: "
        "use output='logit' for it, or a method such as IntegratedGradients or DeepLift"
    )


def _joined(inputs: Mapping[str, Tensor]) -> Tensor:
    """Several image inputs as one tensor, channel behind channel."""
    first = next(iter(inputs.values()))
    for name, value in inputs.items():
        if value.shape[2:] != first.shape[2:] or len(value) != len(first):
            raise InputError(
                f"image input {name!r} has shape {tuple(value.shape)}, the first one {tuple(first.shape)}: image "
                "inputs must share batch and grid; pass others by network_kwargs"
            )
    joined = torch.cat([torch.as_tensor(v).as_subclass(Tensor).to(first.device) for v in inputs.values()], 1)
    return _batch_like(joined, first) if isinstance(first, MetaTensor) else joined


def _batch_like(values: Tensor, batch: MetaTensor) -> MetaTensor:
    """A batch with another's metadata, marked as one: engines with ``compile=True`` lose the mark."""
    found = MetaTensor(values)
    found.meta, found.applied_operations = batch.meta, batch.applied_operations
    found.is_batch = batch.is_batch or batch.affine.ndim == 3
    return found


def _like(values: Tensor, image: MetaTensor) -> MetaTensor:
    """A map with the image's place in the world and the trace of its preprocessing, but none of its other metadata."""
    found = MetaTensor(values.detach(), affine=image.affine.clone())
    keep = ("original_affine", "spatial_shape", "space", "filename_or_obj")
    found.meta.update({k: image.meta[k] for k in keep if k in image.meta})
    found.applied_operations = list(image.applied_operations)
    return found


def _mask(score: Score | None, image: MetaTensor) -> MetaTensor | None:
    if score is None or not score.box:
        return None
    if any(b.stop > n for b, n in zip(score.box, image.shape[1:])) or len(score.box) != image.ndim - 1:
        return None
    mask = torch.zeros((1, *image.shape[1:]), dtype=torch.bool)
    mask[0][score.box] = score.mask.cpu()
    return _like(mask, image)


def _predicted(prediction: Tensor, names: Mapping[int, str]) -> dict[str, Any]:
    """Predicted class and its probability, for a classification network."""
    if prediction.ndim > 1 and prediction[0].numel() > 1:
        return {}
    flat = prediction.flatten().double()
    probabilities = torch.sigmoid(flat) if len(flat) == 1 else torch.softmax(flat, 0)
    best = int(flat.argmax())
    return {
        "predicted_class": best,
        "predicted_class_name": names.get(best),
        "predicted_probability": float(probabilities[best]),
    }


def _described(inferer: Any) -> dict[str, Any]:
    """An inferer by its class and the parameters that shape the prediction, JSON-ready."""
    values = {k: v for k, v in vars(inferer).items() if not k.startswith("_")} if hasattr(inferer, "__dict__") else {}
    described: dict[str, Any] = {}
    for name, value in values.items():
        if name in HOW_NOT_WHAT or callable(value):
            continue
        described[name] = _sha256(value) if isinstance(value, Tensor) and value.ndim else json_ready(value)
    return {"name": getattr(inferer, "__name__", type(inferer).__name__), **described}


def _sha256(values: Tensor, *more: Any) -> str:
    """Of a tensor's shape, type and bytes, and of what else belongs to it."""
    plain = torch.as_tensor(values).as_subclass(Tensor).detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(plain.shape)}{plain.dtype}{more}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_case(value: Any, index: int, n: int) -> Any:
    """What of a further input belongs to one case of n."""
    return value[index : index + 1] if isinstance(value, Tensor) and value.ndim and len(value) == n else value


def _repeated(value: Any, n: int) -> Any:
    repeats = isinstance(value, Tensor) and value.ndim and len(value) == 1
    return value.expand(n, *value.shape[1:]) if repeats else value


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Peak memory in bytes: of the method on an accelerator, of the process so far on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows has no such count
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
