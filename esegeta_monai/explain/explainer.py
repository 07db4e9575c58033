"""Runs methods on the cases of a batch: the one entrance that all doors share.

explainer = Explainer(network, inferer=SlidingWindowInferer((96, 96, 96), 4, 0.5, "gaussian"))
for attribution in explainer(image, methods=[Saliency()], targets=[MultiClassMask(1)]):
    ...
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.model import check_network, is_scripted, select_output
from esegeta_monai.engine.network.state import frozen, own_modes, unwrap
from esegeta_monai.engine.windows.inferers import as_inferer
from esegeta_monai.errors import InputError, NetworkError, RankLost, UsageError
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.case import CaseInput, cases_of, joined_inputs, of_case
from esegeta_monai.explain.costs import Cost, cost_of
from esegeta_monai.explain.outcomes import Bound, OnError, Outcomes
from esegeta_monai.explain.record import described
from esegeta_monai.explain.run import CaseWork, Judged, Skip
from esegeta_monai.methods.base import METHODS, Method
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.distributed import Processes
from esegeta_monai.utils.types import number

__all__ = ["Attribution", "Explainer", "Judged"]


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
        allow_costly: methods may score more perturbations than `esegeta_monai.explain.costs.COSTLY`, such as an
        occluder of one
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
        self.ranks = Processes.current() if distributed else Processes()
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
        self.window_batch, self.seed = (
            number("window_batch", window_batch, int | None, 0),
            number("seed", seed, int, -1),
        )
        # what the weights do not tell, such as the slope of a LeakyReLU; object addresses aside
        self.structure_sha256: str = hashlib.sha256(re.sub(r" at 0x\w+", "", repr(self.network)).encode()).hexdigest()
        self.progress, self.allow_costly = progress, bool(allow_costly)
        self.time_limit = number("time_limit", time_limit, float | None, 0)
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
                goes on where it was (`esegeta_monai.engine.perturbation.checkpoint.ScoreCheckpoint`); None: nowhere.

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
                for attribution in CaseWork(self, case, channels).explained(chosen, wanted, refused, skip, scores_dir):
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
            for found in CaseWork(self, case, channels).prepared(chosen, wanted, refused):
                if isinstance(found, Attribution):
                    reason = found.record["reason"]
                    yield Cost(case.index, str(found.method.name), found.label, note=reason)
                    continue
                for method in found.methods:
                    for k, bound in enumerate(found.bound):
                        with own_modes(self.device), frozen(self.network):
                            cost = cost_of(
                                method,
                                found.objective.derive(scores=[found.objective.scores[k]]),
                                case.index,
                                bound.label,
                                calibration,
                            )
                        yield cost

    @staticmethod
    def _inputs(image: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
        """The images as one tensor, and how many channels each named one has."""
        inputs = dict(image) if isinstance(image, Mapping) else {}
        joined = joined_inputs(inputs) if inputs else image
        if not isinstance(joined, Tensor) or joined.ndim not in (4, 5) or 0 in joined.shape[1:]:
            found = f"shape {tuple(joined.shape)}" if isinstance(joined, Tensor) else type(joined).__name__
            raise InputError(f"image must be (B, C, *spatial) in 2D or 3D, a tensor, got {found}")
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
            yield from CaseWork(self, case, {}).judged(wanted)

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

    @property
    def _autocast(self) -> str | None:
        if not self.amp:
            return None
        return str(self.amp_kwargs.get("dtype", torch.float16 if self.device.type == "cuda" else torch.bfloat16))

    def _refused(self, methods: Sequence[Method]) -> dict[int, Exception]:
        """Methods (by id) that this network cannot serve, each with its error."""
        if not is_scripted(self.network):
            return {}
        need = [m for m in methods if m.needs_gradient or m.produces in ("layer map", "activation")]
        error = NetworkError(
            f"{', '.join(str(m.name) for m in need)}: gradients or layers are needed, which a TorchScript or TensorRT "
            "network does not give; load the plain PyTorch network, or use a perturbation method such as Occlusion"
        )
        return {id(m): error for m in need}
