"""Run methods on the cases of a batch; all interfaces use it.

explainer = Explainer(network, inferer=SlidingWindowInferer((96, 96, 96), 4, 0.5, "gaussian"))
for attribution in explainer(image, methods=[Saliency()], targets=[MultiClassMask(1)]):
    ...
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.checks.layers import layer_findings
from esegeta_monai.engine.head import HeadKind, Postprocessing
from esegeta_monai.engine.network.declared_axes import layer_axes_of
from esegeta_monai.engine.network.state import evaluating, unwrap
from esegeta_monai.engine.windows.inferers import as_inferer
from esegeta_monai.errors import EsegetaError, RankLost, UsageError
from esegeta_monai.explain.attribution import Attribution, Attributions
from esegeta_monai.explain.case import BatchInputs
from esegeta_monai.explain.costs import TRIALS, Cost, costs_of, with_agreement
from esegeta_monai.explain.outcomes import BoundTarget, Outcomes
from esegeta_monai.explain.prediction import Prediction
from esegeta_monai.explain.run import CaseRun, JudgedCase, OnBegin, Skip
from esegeta_monai.explain.settings import (
    DEFAULT_METHODS,
    Checks,
    InputsAs,
    OnError,
    Settings,
    checks_of,
    default_targets,
)
from esegeta_monai.methods.base import METHODS
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.distributed import Processes
from esegeta_monai.utils.types import device_named, flag, number

__all__ = ["Attribution", "Attributions", "Explainer"]


class Explainer:
    """An explainer of a network's predictions.

    The image is never modified. The network is restored after each call: weights, training flags, hooks,
    ``requires_grad``.

    Args:
        network: any `torch.nn.Module`; of (Distributed)DataParallel, the wrapped module is used.
        inferer: the inferer of the prediction; None: the network sees the whole image.
        device: device on which windows are computed, which must be the network's; None: the network's.
        amp: autocast (float16 on CUDA, bfloat16 elsewhere, or ``amp_kwargs["dtype"]``) for methods that allow it. On a
            CPU this differs from MONAI's engines, whose ``amp`` changes nothing there.
        volume_device: device that stores volumes; None: the inferer's ``device``, else ``device``.
        output: key or index of the explained output, if the network returns several; a path for nested ones,
            ``"classification.0"``; for one tensor (B, heads, K, *spatial) or (B, steps, K), the index along its second
            axis. None: see `esegeta_monai.engine.network.outputs.choose_output`.
        class_names: class number to name, for targets by name and for records.
        channel_names: names of the image's channels, for records.
        window_batch: windows per forward pass; None: the inferer's ``sw_batch_size``, 4 for other inferers.
        seed: seed of every random draw.
        progress: show a progress bar with the remaining time for each group of methods.
        time_limit: seconds per method; a method that takes longer ends as ``timeout`` and the next one begins.
        allow_costly: run methods that score more perturbations than `esegeta_monai.explain.costs.COSTLY`, such as
            an occluder of one voxel on a volume; otherwise they are refused with the number.
        distributed: the processes of ``torch.distributed`` compute each case together and must be called with the same
            cases: they share windows and perturbations, and every process gets the whole maps. Each process has the
            network on its own device, without a wrapper.
        on_error: ``"raise"``, or ``"record"``: a failed method, target or case gives an attribution without a map, and
            the others are still computed.
        checks: check what maps take for granted, once per network on a small window (at most 40 passes) and per case
            without passes; results are in the record as ``checks``. ``"once"``: once per network, also if its weights
            change. ``"maps"``: check each finished map as well, which takes further passes (docs/checks.md).
        head: the meaning of the output, see `esegeta_monai.engine.head.Head`: ``"softmax"`` or ``"sigmoid"`` (this
            function of the output gives probabilities), ``"softmax inside"``, ``"sigmoid inside"`` or
            ``"log-softmax inside"`` (the network ends in it), ``"raw"`` (no scores of classes). None: determined from
            the network's last operations, the range of its output, and the postprocessing.
        postprocessing: the transforms of a bundle's postprocessing, or an `esegeta_monai.engine.head.Postprocessing`;
            they show what the output is, and which thresholds and outputs are used. They are not run.
        inputs_as: how several image inputs are passed to the network: ``"dict"`` (by name) or ``"list"`` as its only
            argument; None: the first by position, the others by name.
        memory_format: order of values in memory on the network's device, 2D and 3D: ``"contiguous"``,
            ``"channels_last"``, or ``"auto"``, which measures both on the first windows; the choice is stored in the
            run, and used again when it is resumed. None: by a fixed rule for the device and the network's operations
            (`esegeta_monai.engine.network.memory_format.format_by_rule`). Channels-last is used only where it gives
            the numbers of contiguous windows; what was used, and why, is in the record.
        agreement: compute the maps of the members of an ensemble, and of its mirrored views, alone as well: the record
            has under ``agreement`` how far they agree, and the maps are in `Attribution.agreement`. It takes the
            passes of the ensemble once more for members and for views, and the memory of one map for each.
        local: compute of a perturbed window only what the perturbation changes and the target reads, where that takes
            at most two thirds of the work; False: always the whole window. The scores are the same but for rounding,
            and are compared with plain passes in every run; the record has under ``below_the_window`` what was done.

    Raises:
        UsageError: the network is no module, or a parameter has a wrong value.
        NetworkError: half-precision weights, a network on another device, or one built under ``inference_mode``.

    Example:
        >>> from esegeta_monai.methods import Saliency
        >>> from esegeta_monai.targets import ClassScore
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> explainer = Explainer(network)
        >>> attribution, = explainer(torch.rand(1, 1, 4, 4), methods=[Saliency()], targets=[ClassScore(1)])
        >>> tuple(attribution.map.shape), attribution.status
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
        output: int | str | Sequence[int | str] | None = None,
        class_names: Mapping[int, str] | None = None,
        channel_names: Sequence[str] | None = None,
        window_batch: int | None = None,
        seed: int = 0,
        progress: bool = False,
        time_limit: float | None = None,
        allow_costly: bool = False,
        distributed: bool = False,
        on_error: OnError = "raise",
        checks: Checks = True,
        head: HeadKind | None = None,
        postprocessing: Any = None,
        inputs_as: InputsAs | None = None,
        agreement: bool = False,
        local: bool = True,
        layer_axes: Mapping[str, str] | None = None,
        memory_format: str | None = None,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise UsageError(
                f"network is a {type(network).__name__}: give the module itself; from a bundle's folder, "
                "esegeta_monai.bundle.BundleReader(folder).network"
            )
        if class_names is not None and not isinstance(class_names, Mapping):
            raise UsageError(f"class_names={class_names!r}: give the name of each number, such as {{1: 'liver'}}")
        network, inferer = unwrap(network), as_inferer(inferer)
        own = next((p.device for p in network.parameters()), torch.device("cpu"))
        device = own if device is None else device_named("device", device)
        self.settings = Settings(
            network=network,
            inferer=inferer,
            device=device,
            volume_device=device_named("volume_device", volume_device or getattr(inferer, "device", None) or device),
            amp=flag("amp", amp),
            amp_kwargs=dict(amp_kwargs or {}),
            output=output if output is None or isinstance(output, (int, str)) else ".".join(map(str, output)),
            class_names={int(k): v for k, v in (class_names or {}).items()},
            channel_names=list(channel_names or []),
            window_batch=number("window_batch", window_batch, int | None, 0),
            seed=number("seed", seed, int, -1),
            progress=flag("progress", progress),
            time_limit=number("time_limit", time_limit, float | None, 0),
            allow_costly=flag("allow_costly", allow_costly),
            processes=Processes.current() if flag("distributed", distributed) else Processes(),
            on_error=on_error,
            head=head,
            postprocessing=Postprocessing.of(postprocessing),
            inputs_as=inputs_as,
            checks=checks_of(checks),
            agreement=flag("agreement", agreement),
            local=flag("local", local),
            layer_axes=layer_axes_of(layer_axes),
            memory_format=memory_format,
        )

    def __call__(
        self,
        image: Tensor | Mapping[str, Tensor],
        methods: Any = DEFAULT_METHODS,
        targets: Any = None,
        *,
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        prediction: Any = None,
        network_args: Sequence[Any] = (),
        network_kwargs: Mapping[str, Any] | None = None,
        skip: Skip | None = None,
        scores_dir: str | os.PathLike[str] | None = None,
        on_begin: OnBegin | None = None,
    ) -> Attributions:
        """Explain every case of a batch by every method for every target.

        Args:
            image: tensor or MetaTensor (B, C, *spatial). A mapping of names to such tensors explains several image
                inputs together, with one map per input: the first is passed to the network positionally, the others by
                name (see ``inputs_as``).
            methods: methods, names or configs.
            targets: targets, names or configs; None: every predicted class except background, or the first value of a
                regression (`esegeta_monai.engine.head.Postprocessing.declared`).
            data: the case's data dictionary (a list of them for a batch), in which targets look up masks and labels.
            prediction: the network's raw output for the batch (B, K, …), if it is already known.
            network_args, network_kwargs: further inputs of the network, passed through. A tensor whose first axis is
                as long as the batch is sliced to the case; ``condition`` is also cut to the windows, as MONAI does.
            skip: called before anything is computed, with an attribution that has no map yet and the record of what
                would be computed; if it returns True, the attribution is left out.
            scores_dir: folder in which perturbation methods save their scores while they run, so that an interrupted
                run can be resumed (`esegeta_monai.engine.perturbation.checkpoint.ScoreCheckpoint`); None: not saved.
            on_begin: called before methods that share passes run, with their attributions, which have no map yet.

        Returns:
            `Attributions`, case by case: a sequence whose elements are computed when they are first read. Its maps are
            kept; see `stream`.

        Raises:
            EsegetaError: a wrong name or parameter; with ``on_error="raise"``, any failure. It is raised when the
                attributions are read.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            >>> explained = Explainer(network)(torch.rand(1, 1, 8, 8))
            >>> [attribution.method.name for attribution in explained], explained[0].status
            (['Saliency', 'GradCam'], 'ok')
        """
        options: dict[str, Any] = {"data": data, "prediction": prediction, "skip": skip, "scores_dir": scores_dir}
        options |= {"network_args": network_args, "network_kwargs": network_kwargs, "on_begin": on_begin}
        return Attributions(lambda: self.stream(image, methods, targets, **options))

    def stream(
        self,
        image: Tensor | Mapping[str, Tensor],
        methods: Any = DEFAULT_METHODS,
        targets: Any = None,
        *,
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        prediction: Any = None,
        network_args: Sequence[Any] = (),
        network_kwargs: Mapping[str, Any] | None = None,
        skip: Skip | None = None,
        scores_dir: str | os.PathLike[str] | None = None,
        on_begin: OnBegin | None = None,
    ) -> Iterator[Attribution]:
        """Yield the attributions of `__call__`, with its arguments, without keeping them.

        Yields:
            `Attribution`, case by case.

        Raises:
            EsegetaError: a wrong name or parameter; with ``on_error="raise"``, any failure.

        Example:
            >>> explainer = Explainer(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
            >>> [a.status for a in explainer.stream(torch.rand(1, 1, 4, 4), "Saliency", "ClassScore(1)")]
            ['ok']
        """
        if targets is None:
            targets = default_targets(self.settings.postprocessing.declared)
        chosen, wanted = METHODS.create_all(methods), TARGETS.create_all(targets)
        settings = self.settings
        refused = settings.refused(chosen)
        if refused and settings.on_error == "raise":
            raise next(iter(refused.values()))
        inputs = BatchInputs(image, data, prediction, network_args, network_kwargs)
        for case in inputs.cases(settings.output, settings.postprocessing.keys):
            done: set[tuple[int, int]] = set()
            try:
                for attribution in CaseRun(settings, case).explained(
                    chosen, wanted, refused, skip, scores_dir, on_begin
                ):
                    done.add((id(attribution.method), id(attribution.target)))
                    yield attribution
            except Exception as error:
                if settings.on_error == "raise" or isinstance(error, RankLost):
                    raise
                outcomes = Outcomes(settings, case)
                for method in chosen:
                    for target in (t for t in wanted if (id(method), id(t)) not in done):
                        bound = BoundTarget(target, None, error)
                        yield outcomes.failed(method, bound, outcomes.record(method, bound, None), error)

    def costs(
        self,
        image: Tensor | Mapping[str, Tensor],
        methods: Any,
        targets: Any,
        *,
        calibration: float = 3.0,
        **inputs: Any,
    ) -> Iterator[Cost]:
        """Estimate the cost per case, method and target, for each method run alone.

        The prediction is computed, since the targets' windows depend on it, and each method runs briefly to time its
        passes. Methods that share their passes (gradient and CAM methods) cost less together.

        Args:
            image, methods, targets: as in `__call__`.
            calibration: largest number of seconds for which each method is run; less for many methods, which share
                `esegeta_monai.explain.costs.TRIALS` seconds.
            inputs: ``data``, ``prediction``, ``network_args``, ``network_kwargs`` as in `__call__`.

        Raises:
            EsegetaError: a wrong name or parameter, or a case that cannot be predicted.

        Example:
            >>> from esegeta_monai.methods import Saliency
            >>> from esegeta_monai.targets import ClassScore
            >>> explainer = Explainer(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)))
            >>> [cost.passes for cost in explainer.costs(torch.rand(1, 1, 4, 4), [Saliency()], [ClassScore(1)])]
            [1]
        """
        chosen, wanted = METHODS.create_all(methods), TARGETS.create_all(targets)
        settings = self.settings
        refused = settings.refused(chosen)
        for case in BatchInputs(image, **inputs).cases(settings.output, settings.postprocessing.keys):
            for task in CaseRun(settings, case).prepared(chosen, wanted, refused):
                if isinstance(task, Attribution):
                    yield Cost(case.index, str(task.method.name), task.label, note=task.record["reason"])
                    continue
                alone = [task.objective.derive(scores=[score]) for score in task.objective.scores]
                labels = [bound.label for bound in task.bound]
                share = calibration if len(chosen) == 1 else min(calibration, TRIALS / len(chosen))
                for method in task.methods:
                    with evaluating(settings.network, settings.device, task.objective.model.memory_format):
                        costs = costs_of(method, alone, case.index, labels, share, quick=share < calibration)
                        if settings.agreement:
                            costs = [with_agreement(cost, method, one) for cost, one in zip(costs, alone)]
                    yield from costs

    def check(self, image: Tensor | Mapping[str, Tensor], **inputs: Any) -> list[CheckResult]:
        """Check what maps take for granted about the network and the first image of a batch, without explaining it.

        Args:
            image: as in `__call__`.
            inputs: ``data``, ``prediction``, ``network_args``, ``network_kwargs`` as in `__call__`.

        Returns:
            One result per check; the last one is ``refused`` if the case cannot be predicted.

        Example:
            >>> explainer = Explainer(nn.Conv2d(1, 2, 3, padding=1))
            >>> explainer.check(torch.rand(1, 1, 8, 8))[0].name
            'input'
        """
        case = next(BatchInputs(image, **inputs).cases(self.settings.output))
        try:
            predicted = Prediction(replace(self.settings, checks=self.settings.checks or True), case)
            with evaluating(self.settings.network, self.settings.device):
                case.checks += layer_findings(predicted.objective([]))
        except EsegetaError as error:
            if any(check.text == str(error) for check in case.checks):
                return case.checks
            return [*case.checks, CheckResult("prediction", "refused", str(error))]
        return case.checks

    def judge(self, image: Tensor, targets: Any, **inputs: Any) -> Iterator[JudgedCase]:
        """Yield the objectives of a batch, for metrics that run the network: one per case, and one per layer that
        replaces the prediction.

        Args:
            image: (B, C, *spatial).
            targets: see `__call__`.
            inputs: ``data``, ``prediction``, ``network_args``, ``network_kwargs``, see `__call__`.

        Raises:
            EsegetaError: a case that cannot be explained at all.
        """
        wanted = TARGETS.create_all(targets)
        for case in BatchInputs(image, **inputs).cases(self.settings.output, self.settings.postprocessing.keys):
            yield from CaseRun(self.settings, case).judged(wanted)
