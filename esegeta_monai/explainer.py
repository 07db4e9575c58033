"""Runs methods on the cases of a batch: the one entrance that all doors share.

explainer = Explainer(network, inferer=SlidingWindowInferer((96, 96, 96), 4, 0.5, "gaussian"))
for attribution in explainer(image, methods=[Saliency()], targets=[MultiClassMask(1)]):
    ...
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.attribution import Attribution
from esegeta_monai.cases import CaseInput, cases_of, joined_inputs, of_case
from esegeta_monai.costs import Cost, cost_of, too_costly
from esegeta_monai.errors import (
    EsegetaError,
    InputError,
    NetworkError,
    RankLost,
    UsageError,
)
from esegeta_monai.methods.base import METHODS, Explained, Method, grouped, run_together, shares_passes
from esegeta_monai.network import check_network, frozen, is_scripted, own_modes, select_output, unwrap, weights_hash
from esegeta_monai.objective import Objective, Request, View
from esegeta_monai.outcomes import NOTHING_THERE, Bound, OnError, Outcomes, not_linear
from esegeta_monai.partial import ScoreTable
from esegeta_monai.predicted import Predicted
from esegeta_monai.ranks import Ranks
from esegeta_monai.record import (
    described,
    peak_memory,
    predicted_class,
    reset_peak_memory,
)
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.windows import as_inferer

__all__ = ["Attribution", "Explainer", "Judged"]

logger = logging.getLogger("esegeta_monai")

Skip = Callable[[Attribution], bool]


@dataclass
class _Work:
    """Methods that explain the same targets of a case."""

    methods: list[Method]
    objective: Objective
    bound: list[Bound]
    predicted: Predicted


@dataclass
class Judged:
    """What metrics ask of one case.

    Attributes:
        case: its index in the batch.
        objective: of all targets that have a voxel; None where none has.
        targets, labels: of its scores.
        left_out: label and reason of targets that could not be bound.
        empty: label and reason of those without a voxel.
        time_limit: seconds a method.
        record: of a method and the place of a target, what is known of its map before it is computed.
    """

    case: int
    objective: Objective | None
    targets: list[Target]
    labels: list[str]
    left_out: list[tuple[str, str]]
    empty: list[tuple[str, str]]
    time_limit: float | None
    record: Callable[[Method, int], dict[str, Any]]


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
        allow_costly: methods may score more perturbations than `esegeta_monai.costs.COSTLY`, such as an occluder of one
            voxel on a volume; else they are refused with the number.
        distributed: the processes of ``torch.distributed`` compute each case together, called alike with the same
            cases: windows and perturbations are shared between them, and every process gets the whole maps. Each has
            the network on a device of its own; it is not wrapped.
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
        allow_costly: bool = False,
        distributed: bool = False,
        on_error: OnError = "raise",
    ) -> None:
        self.ranks = Ranks.current() if distributed else Ranks()
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
        self.structure_sha256: str = hashlib.sha256(re.sub(r" at 0x\w+", "", repr(self.network)).encode()).hexdigest()
        self.progress, self.time_limit, self.allow_costly = progress, time_limit, bool(allow_costly)
        if on_error not in ("raise", "record"):
            raise UsageError(f"on_error={on_error!r}: give 'raise' or 'record'")
        self.on_error = on_error
        settings = {
            "seed": self.seed,
            "inferer": described(self.inferer),
            "output": self.output,
            "network": {"name": type(self.network).__name__, "structure_sha256": self.structure_sha256},
        }
        self.outcomes = Outcomes(settings, self._autocast, self.channel_names, on_error)

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
        scores_dir: str | os.PathLike[str] | None = None,
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
            scores_dir: where perturbation methods keep their scores while they run, so that a run that was stopped
                goes on where it was (`esegeta_monai.partial.ScoreTable`); None: nowhere.

        Yields:
            `Attribution`, case by case.

        Raises:
            EsegetaError: a wrong name or parameter; with ``on_error="raise"`` anything that goes wrong.
        """
        chosen, wanted = METHODS.create_all(methods), TARGETS.create_all(targets)
        refused = self._refused(chosen)
        if refused and self.on_error == "raise":
            raise next(iter(refused.values()))
        image, channels = self._inputs(image)
        for case in self._cases(image, prediction, data, network_args, network_kwargs or {}):
            told: set[tuple[int, int]] = set()
            try:
                for attribution in self._explain_case(case, chosen, wanted, channels, refused, skip, scores_dir):
                    told.add((id(attribution.method), id(attribution.target)))
                    yield attribution
            except Exception as error:
                if self.on_error == "raise" or isinstance(error, RankLost):
                    raise
                for method in chosen:
                    for target in (t for t in wanted if (id(method), id(t)) not in told):
                        bound = Bound(target, None, error)
                        record = self.outcomes.record(method, bound, None, case)
                        yield self.outcomes.failed(method, bound, case, record, error)

    def costs(
        self,
        image: Tensor | Mapping[str, Tensor],
        methods: Any,
        targets: Any,
        *,
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        prediction: Any = None,
        network_args: Sequence[Any] = (),
        network_kwargs: Mapping[str, Any] | None = None,
        calibration: float = 3.0,
    ) -> Iterator[Cost]:
        """What explaining would cost: for each case, method and target, the method run alone.

        The prediction is computed, since the targets' windows depend on it, and each method is run for a moment, to
        see how long a pass takes. Methods that share their passes (gradient and CAM methods) need less together.

        Args:
            image, methods, targets, data, prediction, network_args, network_kwargs: as in `__call__`.
            calibration: seconds that each method is run for at most.

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
        refused = self._refused(chosen)
        image, channels = self._inputs(image)
        for case in self._cases(image, prediction, data, network_args, network_kwargs or {}):
            for found in self._prepare(case, chosen, wanted, channels, refused, None):
                if isinstance(found, Attribution):
                    reason = found.record["reason"]
                    yield Cost(case.index, str(found.method.name), found.label, note=reason)
                    continue
                for method in found.methods:
                    for k, bound in enumerate(found.bound):
                        with own_modes(self.device), frozen(self.network):
                            cost = cost_of(method, found.objective.only(k), case.index, bound.label, calibration)
                        yield cost

    @staticmethod
    def _inputs(image: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
        """The images as one tensor, and how many channels each named one has."""
        inputs = dict(image) if isinstance(image, Mapping) else {}
        joined = joined_inputs(inputs) if inputs else image
        assert isinstance(joined, Tensor)
        if joined.ndim not in (4, 5):
            raise InputError(f"image must be (B, C, *spatial) in 2D or 3D, got shape {tuple(joined.shape)}")
        return joined, {n: v.shape[1] for n, v in inputs.items()}

    def judge(
        self,
        image: Tensor,
        targets: Any,
        *,
        data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        prediction: Any = None,
        network_args: Sequence[Any] = (),
        network_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Judged]:
        """The objectives of a batch, for metrics that ask the network themselves: one a case, and one for each layer
        that takes the prediction's place.

        Args:
            image, targets, data, prediction, network_args, network_kwargs: see `__call__`.

        Raises:
            EsegetaError: a case that cannot be explained at all.
        """
        wanted = TARGETS.create_all(targets)
        for case in self._cases(image, prediction, data, network_args, network_kwargs or {}):
            for layer in dict.fromkeys(t.layer for t in wanted):
                mine = [t for t in wanted if t.layer == layer]
                predicted = Predicted(self, case, {}, layer)
                bound = list(predicted.bind(mine))
                seen = [b for b in bound if b.score is not None and not b.score.empty]
                left = [(b.label, str(b.error)) for b in bound if b.score is None]
                empty = [
                    (b.label, NOTHING_THERE.format(b.label)) for b in bound if b.score is not None and b not in seen
                ]
                objective = None
                if seen:
                    scores = [b.score for b in seen if b.score is not None]
                    objective = predicted.objective(scores)
                names = [b.label for b in seen]

                def record(
                    method: Method, k: int, seen: list[Bound] = seen, predicted: Predicted = predicted
                ) -> dict[str, Any]:
                    return self.outcomes.record(method, seen[k], predicted.plan, predicted.case)

                at = [b.target for b in seen]
                yield Judged(case.index, objective, at, names, left, empty, self.time_limit, record)

    # -- cases --------------------------------------------------------------------------------------------------

    def _cases(
        self, image: Tensor, prediction: Any, data: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Iterator[CaseInput]:
        output = None if prediction is None else select_output(prediction, self.output)
        n = len(image)
        several = list(data) if isinstance(data, Sequence) else [data or {}] * n
        condition = kwargs.get("condition")
        if len(several) != n:
            raise UsageError(f"data has {len(several)} entries for {n} images")
        for i, one in enumerate(cases_of(image)):
            yield CaseInput(
                i,
                one,
                None if output is None else output[i],
                several[i],
                None if condition is None else torch.as_tensor(condition[i]).as_subclass(Tensor),
                [of_case(a, i, n) for a in args],
                {k: of_case(v, i, n) for k, v in kwargs.items() if k != "condition"},
            )

    def _explain_case(
        self,
        case: CaseInput,
        methods: Sequence[Method],
        targets: Sequence[Target],
        channels: dict[str, int],
        refused: Mapping[int, Exception],
        skip: Skip | None,
        scores_dir: str | os.PathLike[str] | None,
    ) -> Iterator[Attribution]:
        for found in self._prepare(case, methods, targets, channels, refused, skip):
            if isinstance(found, Attribution):
                yield found
                continue
            if not shares_passes(found.methods[0]):  # else its sweep compares
                with own_modes(self.device), frozen(self.network):
                    found.objective.sweep([_Blend()])
            for group in grouped(found.methods):
                found.objective.table = None
                if scores_dir is not None and not group[0].needs_gradient:
                    found.objective.table = ScoreTable(Path(scores_dir), self._decides(group[0], found, case))
                yield from self._explain_group(group, found, case, channels)

    def _prepare(
        self,
        case: CaseInput,
        methods: Sequence[Method],
        targets: Sequence[Target],
        channels: dict[str, int],
        refused: Mapping[int, Exception],
        skip: Skip | None,
    ) -> Iterator[Attribution | _Work]:
        """What there is to do for a case, after its prediction; and what there is not, and why."""
        layers = list(dict.fromkeys(t.layer for t in targets))
        if len(layers) > 1:  # a layer takes the place of the prediction
            for layer in layers:
                mine = [t for t in targets if t.layer == layer]
                yield from self._prepare(case, methods, mine, channels, refused, skip)
            return
        predicted = Predicted(self, case, channels, layers[0] if layers else None)
        todo: dict[tuple[int, ...], list[Method]] = {}
        bound = list(predicted.bind(targets))
        for method in methods:
            left = []
            for j, b in enumerate(bound):
                record = self.outcomes.record(method, b, predicted.plan, case)
                if skip and skip(Attribution(None, method, b.target, case.index, record, b.label)):
                    continue
                error = refused.get(id(method), b.error)
                if error is not None:
                    yield self.outcomes.failed(method, b, case, record, error)
                elif b.score is None or (b.score.empty and method.needs_voxels):
                    yield self.outcomes.empty(method, b, case, record)
                elif method.needs_linear and not b.score.linear:
                    yield self.outcomes.failed(method, b, case, record, not_linear(method, b))
                else:
                    left.append(j)
            if left:
                todo.setdefault(tuple(left), []).append(method)
        for seen, together in todo.items():
            part = [bound[j] for j in seen]
            scores = [b.score for b in part if b.score is not None]
            objective = predicted.objective(scores)
            affordable = []
            for method in together:
                refusal = None if self.allow_costly else _refusal(method, objective)
                if refusal is None:
                    affordable.append(method)
                    continue
                for b in part:
                    yield self.outcomes.failed(
                        method, b, case, self.outcomes.record(method, b, predicted.plan, case), refusal
                    )
            if affordable:
                yield _Work(affordable, objective, part, predicted)

    def _explain_group(
        self,
        group: Sequence[Method],
        work: _Work,
        case: CaseInput,
        channels: dict[str, int],
    ) -> Iterator[Attribution]:
        """Methods that share their passes, in one run of the network."""
        objective, monitor = work.objective, work.objective.monitor
        monitor.start(None if self.time_limit is None else self.time_limit * len(group))
        reset_peak_memory(self.device)
        began = time.monotonic()
        names = ", ".join(m.name or type(m).__name__ for m in group)
        with self._bar(names, group, objective), own_modes(self.device), frozen(self.network):
            results = run_together(group, objective)
        if objective.table is not None and all(isinstance(r, Explained) for r in results.values()):
            objective.table.remove()
        seconds = time.monotonic() - began
        shared = {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(self.device),
            "windows_used": len(objective.windows),
            "windows_total": len(objective.plan),
            "window_passes": sum(self.ranks.gather(monitor.passes)),
            "ranks": self.ranks.size,
            "window_batch": objective.window_batch,
            "warnings": [*work.predicted.notes, *monitor.warnings],
        }
        if len(group) > 1:
            shared["passes_shared_with"] = [m.name for m in group]
        logger.info("case %d: %s took %.1f s, %d window passes", case.index, names, seconds, monitor.passes)
        values = objective.image_values() if any(isinstance(r, Explained) for r in results.values()) else None
        for i, method in enumerate(group):
            outcome = results[i]
            for k, b in enumerate(work.bound):
                record = self.outcomes.record(method, b, objective.plan, case)
                record.update(shared)
                record["blend_deviation"] = objective.blend_deviation[k]
                if isinstance(outcome, Exception):
                    yield self.outcomes.failed(method, b, case, record, outcome)
                    continue
                assert values is not None
                record["value"] = float(values[k])
                if b.target.layer is None:
                    record.update(predicted_class(work.predicted.prediction, self.class_names))
                yield from self.outcomes.finished(method, b, case, record, outcome, k, channels)

    # -- parts --------------------------------------------------------------------------------------------------

    def _decides(self, method: Method, work: _Work, case: CaseInput) -> dict[str, Any]:
        """What decides the scores of perturbations."""
        records = [self.outcomes.record(method, b, work.objective.plan, case) for b in work.bound]
        names = ("parameters", "amp", "seed", "inferer", "output", "network", "network_affine", "image_sha256")
        return {
            "method": type(method).__name__,
            "weights_sha256": weights_hash(self.network),
            "targets": [[r["target"], r["target_parameters"], r["target_sha256"]] for r in records],
            **{name: records[0][name] for name in names},
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


def _refusal(method: Method, objective: Objective) -> EsegetaError | None:
    """Why a method is not even begun: it costs too much, or its parameters do not fit the image."""
    try:
        return too_costly(method, objective)
    except EsegetaError as error:
        return error


class _Blend(Request):
    """Asks for nothing: the sweep itself compares the blended windows with the prediction."""

    backward = False
    summed = ()

    def see(self, view: View) -> None:
        """Nothing to gather."""

    def result(self) -> None:
        """Nothing."""
