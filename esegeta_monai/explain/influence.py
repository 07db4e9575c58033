"""Training cases that raised or lowered a prediction: TracIn (Pruthi et al. 2020), and a projection like TRAK's (Park
et al. 2023).

A score is positive if the training case raised the target (lowered the loss, where a loss is explained). Both are first
approximations: they take each step for plain SGD on this case's loss, on the fixed patches of `TrainingLoss`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import esegeta_monai
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.parameter_gradients import checkpoint_weights, parameter_gradients, parameters_of
from esegeta_monai.engine.sparse_projection import SparseProjection
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.concept_cases import objectives_of
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.training_loss import TrainingCase, TrainingLoss
from esegeta_monai.targets.base import TARGETS

__all__ = ["Checkpoint", "ExplainedCase", "Influence", "InfluenceRun", "TracIn", "Trak", "influence"]

APPROXIMATION = (
    "first approximation: each step of the training counts as plain SGD on the case's loss on fixed patches, in "
    "evaluation mode and without augmentation; Adam, momentum, a loss over the batch and augmentation are not in it"
)
LOSS = "loss"
"""Name of the target of an explained case that is given as a `TrainingCase`."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights that the training passed through.

    Attributes:
        weights: state dict, tensors of any shape.
        learning_rate: η of the steps near it; equal values for all give each the same weight.
        name: in the record.
    """

    weights: Mapping[str, Tensor]
    learning_rate: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"learning rate {self.learning_rate} of checkpoint {self.name!r}: give a positive number")


@dataclass(frozen=True)
class ExplainedCase:
    """A case whose prediction is explained.

    Attributes:
        name: its name.
        image: (1, C, *spatial).
        targets: targets of the prediction, names or instances as for `esegeta_monai.Explainer`.
        inputs: ``data`` and ``prediction`` of `esegeta_monai.Explainer.__call__`.
    """

    name: str
    image: Tensor
    targets: Sequence[Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TracIn:
    """TracIn over checkpoints t (TracInCP): ``Σ_t η_t ⟨∇F_t, −∇ℓ_t(z)⟩``, by how much steps on case z raised F.

    Attributes:
        form: ``"cosine"``: the mean over checkpoints, weighted by η_t, of the cosine of the two vectors, −1 to 1, so
            that cases with large gradients do not lead every list; ``"dot"``: the sum above, in units of the target.
    """

    form: Literal["cosine", "dot"] = "cosine"

    def __post_init__(self) -> None:
        if self.form not in ("cosine", "dot"):
            raise UsageError(f"form={self.form!r}: give 'cosine' or 'dot'")


@dataclass(frozen=True)
class Trak:
    """Influence on F by the kernel of projected gradients: ``∇Fᵀ (ΦᵀΦ + λ)⁻¹ (−∇ℓ(z))``, the mean over checkpoints.

    Row z of Φ is the gradient of z's output function, ``∇ℓ(z)/c(z)``. For a linear network, the squared error
    ``½(f − y)²`` and no projection it is the influence function of ridge regression.

    Attributes:
        dimension: numbers that a gradient is projected to (`SparseProjection`), a multiple of eight; None: none, for
            small networks.
        ridge: λ as a share of the mean squared length of the rows of Φ, above 0.
        output: c(z): ``"margin"``, ``1 − exp(−ℓ)`` (TRAK's log-odds of the right answer, for cross-entropy and losses
            that are 0 for a perfect answer); ``"residual"``, ``√(2ℓ)`` (for ``½(f − y)²``); ``"loss"``, 1.
        seed: of the projection.
    """

    dimension: int | None = 1024
    ridge: float = 1e-2
    output: Literal["margin", "residual", "loss"] = "margin"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.output not in ("margin", "residual", "loss"):
            raise UsageError(f"output={self.output!r}: give 'margin', 'residual' or 'loss'")
        if not 0 < self.ridge < float("inf"):
            raise UsageError(f"ridge={self.ridge}: give a number above 0, since there are fewer cases than weights")

    @property
    def projection(self) -> SparseProjection | None:
        """The projection; None: gradients stay as they are."""
        return None if self.dimension is None else SparseProjection(self.dimension, self.seed)

    def share(self, loss: float, case: str) -> float:
        """Return c(z).

        Raises:
            InputError: the loss is negative.
        """
        if self.output == "loss":
            return 1.0
        if loss < 0:
            raise InputError(f"{case}: the loss is {loss:.4g}, below 0, so that it has no {self.output}: output='loss'")
        return float(-np.expm1(-loss)) if self.output == "margin" else float(np.sqrt(2 * loss))


@dataclass(frozen=True)
class Influence:
    """Scores of training cases for explained cases.

    Attributes:
        explained: (case, target) of each row of scores.
        training: name of each column, a training case.
        scores: (T, N), float64: positive if the training case raised the target, see the method for the unit.
        self_influence: (N,), how strongly a case acts on its own loss: ``Σ_t η_t |∇ℓ_t(z)|²`` for TracIn, the mean of
            ``∇ℓᵀ(ΦᵀΦ + λ)⁻¹∇ℓ`` for TRAK. Wrong labels are often among the largest.
        losses: (N,), mean loss over the checkpoints.
        record: parameters and notes, JSON-ready.
    """

    explained: Sequence[tuple[str, str]]
    training: Sequence[str]
    scores: np.ndarray
    self_influence: np.ndarray
    losses: np.ndarray
    record: Mapping[str, Any]

    def ranked(self, row: int) -> list[int]:
        """Return the columns in order of their score for one explained case and target, the most helpful first."""
        return np.argsort(-self.scores[row], kind="stable").tolist()

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each explained case, target and training case, the most helpful first."""
        return [
            {
                "case": case,
                "target": target,
                "training_case": self.training[n],
                "rank": rank,
                "score": float(self.scores[t, n]),
                "self_influence": float(self.self_influence[n]),
                "loss": float(self.losses[n]),
            }
            for t, (case, target) in enumerate(self.explained)
            for rank, n in enumerate(self.ranked(t), 1)
        ]


class InfluenceRun:
    """Influence, case by case: first `explain` what is asked about, then `add` the training cases, one in memory.

    Checkpoints and the gradients of the explained targets stay in memory: (checkpoints) x (1 + targets) times the
    weights, unprojected for TracIn.

    Args:
        explainer: of the network; its weights decide the masks of the targets, which are the same at all checkpoints.
        loss: the training loss.
        checkpoints: at least one.
        method: `TracIn` or `Trak`.
        layers: dotted names of the layers whose weights count; None: all.

    Raises:
        UsageError: no checkpoint, no such layer, or an ensemble.
        NetworkError: a checkpoint does not fit the network.
    """

    def __init__(
        self,
        explainer: Explainer,
        loss: TrainingLoss,
        checkpoints: Sequence[Checkpoint],
        method: TracIn | Trak | None = None,
        layers: Sequence[str] | None = None,
    ) -> None:
        self.explainer, self.loss, self.method, self.layers = explainer, loss, method or TracIn(), layers
        settings = explainer.settings
        if not checkpoints:
            raise UsageError("influence needs at least one checkpoint of the training")
        if getattr(settings.inferer, "members", ()):
            raise UsageError("an ensemble has several trainings: explain one member, with its own checkpoints")
        self.parameters = parameters_of(settings.network, layers)
        self.projection = self.method.projection if isinstance(self.method, Trak) else None
        self.rates = torch.tensor([c.learning_rate for c in checkpoints], dtype=torch.float64)
        self.names = [c.name for c in checkpoints]
        self.members = [(checkpoint_weights(settings.network, c.weights),) for c in checkpoints]
        self.models = [self._model(member) for member in self.members]
        self.slice_axis: int | None = None
        self.explained: list[tuple[str, str]] = []
        self.asked: list[list[Tensor]] = [[] for _ in checkpoints]  # ∇F of each target, by checkpoint
        self.training: list[str] = []
        self.losses: list[list[float]] = []
        self.lengths: list[list[float]] = []
        self.products: list[Tensor] = []  # TracIn: (checkpoints, T) of each training case
        self.kept: list[list[Tensor]] = [[] for _ in checkpoints]  # TRAK: projected ∇ℓ, by checkpoint

    def _model(self, member: tuple[dict[str, Tensor]]) -> Model:
        settings = self.explainer.settings
        return Model(settings.network, settings.device, output=settings.output, members=member)

    def explain(self, case: ExplainedCase | TrainingCase) -> list[str]:
        """Take the gradients of a case's targets, or of minus its loss, at all checkpoints.

        Returns:
            Names of the targets that have a voxel.

        Raises:
            UsageError: a training case was added before.
            EsegetaError: the case cannot be predicted, or a target cannot be bound.
        """
        if self.training:
            raise UsageError("explain all cases before the first training case is added")
        if isinstance(case, TrainingCase):
            for (gradients, _), asked in zip(self._loss_gradients(case), self.asked):
                asked.append(-gradients[None])
            self.explained.append((case.name, LOSS))
            return [LOSS]
        settings = self.explainer.settings
        objective, names = objectives_of(
            self.explainer, case.image, TARGETS.create_all(list(case.targets)), **case.inputs
        )
        if objective.model.args or objective.model.kwargs or objective.condition is not None:
            raise UsageError("the network has further inputs, which a training case does not name: wrap the network")
        self.slice_axis = objective.plan.slice_axis
        for model in self.models:  # the output and the split of channels that the explained case has shown
            model.inputs, model.inputs_as = objective.model.inputs, objective.model.inputs_as
            model.output = objective.model.output
        if not names:
            return []
        with evaluating(settings.network, settings.device):
            for member, asked in zip(self.members, self.asked):
                gradients = parameter_gradients(_at(objective, member), self.parameters)
                asked.append(gradients if self.projection is None else self.projection(gradients))
        self.explained += [(case.name, name) for name in names]
        return names

    def add(self, case: TrainingCase) -> None:
        """Take the gradient of a training case's loss at all checkpoints.

        Raises:
            EsegetaError: no case was explained, or the loss cannot be computed.
        """
        if not self.explained:
            raise UsageError("no explained case has a voxel of its targets: give other cases or targets")
        if case.name in self.training:
            raise UsageError(f"training case {case.name!r} was added before: give each its own name")
        products, losses, lengths = [], [], []
        for t, (gradient, value) in enumerate(self._loss_gradients(case)):
            losses.append(value)
            lengths.append(float(gradient.square().sum(dtype=torch.float64)))
            if isinstance(self.method, Trak):
                self.method.share(value, case.name)  # raises where the loss has no output function
                self.kept[t].append(gradient.double().cpu())
            else:
                products.append(torch.cat([rows @ gradient for rows in self.asked[t]]).double().cpu())
        self.training.append(case.name)
        self.losses.append(losses)
        self.lengths.append(lengths)
        if products:
            self.products.append(torch.stack(products))

    def _loss_gradients(self, case: TrainingCase) -> Iterable[tuple[Tensor, float]]:
        """Yield ``∂ℓ/∂θ`` (D,), projected where the method projects, and ℓ at each checkpoint."""
        settings = self.explainer.settings
        with evaluating(settings.network, settings.device):
            results = []
            for model in self.models:
                model.load(0)
                value, gradient = self.loss.gradient(model, self.parameters, case, self.slice_axis)
                if self.projection is not None:
                    gradient = self.projection(gradient[None])[0]
                results.append((gradient, value))
        return results

    def result(self) -> Influence:
        """Return the scores of all training cases.

        Raises:
            UsageError: no training case was added.
        """
        if not self.training:
            raise UsageError("there is no training case: give at least one")
        losses = np.array(self.losses)
        by_method = self._trak(losses) if isinstance(self.method, Trak) else self._tracin()
        scores, own = by_method
        record = {
            "version": esegeta_monai.__version__,
            "method": type(self.method).__name__,
            **{name: value for name, value in vars(self.method).items()},
            "checkpoints": self.names,
            "learning_rates": self.rates.tolist(),
            "layers": None if self.layers is None else list(self.layers),
            "weights": sum(p.numel() for p in self.parameters),
            "patch_size": None if self.loss.patch_size is None else list(self.loss.patch_size),
            "patches": self.loss.patches,
            "seed": self.loss.seed,
            "training_cases": len(self.training),
            "notes": [APPROXIMATION],
        }
        return Influence(self.explained, self.training, scores.numpy(), own.numpy(), losses.mean(1), record)

    def _tracin(self) -> tuple[Tensor, Tensor]:
        products = -torch.stack(self.products)  # (N, checkpoints, T)
        lengths = torch.tensor(self.lengths, dtype=torch.float64)  # (N, checkpoints), squared
        own = (lengths * self.rates).sum(1)
        if isinstance(self.method, TracIn) and self.method.form == "dot":
            return (products * self.rates[:, None]).sum(1).T, own
        asked = torch.stack([torch.cat([rows.double().norm(dim=1).cpu() for rows in a]) for a in self.asked])
        scale = lengths.sqrt()[:, :, None] * asked
        cosines = torch.where(scale > 0, products / scale.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        return ((cosines * self.rates[:, None]).sum(1) / self.rates.sum()).T, own

    def _trak(self, losses: np.ndarray) -> tuple[Tensor, Tensor]:
        assert isinstance(self.method, Trak)
        shares = np.array([[self.method.share(v, n) for v in row] for n, row in zip(self.training, losses.tolist())])
        scores = torch.zeros((len(self.explained), len(self.training)), dtype=torch.float64)
        own = torch.zeros(len(self.training), dtype=torch.float64)
        for t, (asked, kept) in enumerate(zip(self.asked, self.kept)):
            gradients = torch.stack(kept)
            c = torch.from_numpy(shares[:, t, None])
            rows = torch.where(c > 0, gradients / c.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
            ridge = self.method.ridge * float(rows.square().sum(1).mean())
            if not ridge > 0:
                raise InputError("the loss of no training case depends on the weights: nothing has an influence")
            wanted = torch.cat([torch.cat([a.double().cpu() for a in asked]), gradients])
            solved = _solved(rows, ridge, wanted)
            scores -= solved[: len(self.explained)] @ gradients.T
            own += (solved[len(self.explained) :] * gradients).sum(1)
        return scores / len(self.kept), own / len(self.kept)


def _solved(rows: Tensor, ridge: float, vectors: Tensor) -> Tensor:
    """Return ``(rowsᵀrows + ridge)⁻¹ vectors`` (m, p) for rows (N, p), by the smaller of the two systems."""
    n, p = rows.shape
    if p <= n:
        system = rows.T @ rows + ridge * torch.eye(p, dtype=rows.dtype)
        return torch.linalg.solve(system, vectors.T).T
    inner = torch.linalg.solve(rows @ rows.T + ridge * torch.eye(n, dtype=rows.dtype), rows @ vectors.T)
    return (vectors - inner.T @ rows) / ridge


def _at(objective: Objective, member: tuple[dict[str, Tensor]]) -> Objective:
    """Return F, with its masks, at the weights of a checkpoint."""
    model = objective.model.without_autocast()
    model.members = member
    return objective.derive(model=model, prediction=None, grid=objective.grid)


def influence(
    explainer: Explainer,
    explained: Iterable[ExplainedCase | TrainingCase],
    training: Iterable[TrainingCase],
    loss: TrainingLoss,
    checkpoints: Sequence[Checkpoint],
    method: TracIn | Trak | None = None,
    layers: Sequence[str] | None = None,
) -> Influence:
    """Compute which training cases raised or lowered the targets of some cases, or their losses.

    Args:
        explainer: of the network, which sees explained cases through its windows.
        explained: cases with targets; a `TrainingCase` asks about its loss (its score is the fall of the loss).
        training: cases of the training set; read one at a time.
        loss: the training loss.
        checkpoints, method, layers: see `InfluenceRun`.

    Raises:
        EsegetaError: see `InfluenceRun`.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> cases = [TrainingCase(n, torch.rand(1, 2, 2), torch.tensor(k)) for k, n in enumerate("ab")]
        >>> asked = ExplainedCase("a", cases[0].image[None], ["ClassScore(0)"])
        >>> loss = TrainingLoss(torch.nn.CrossEntropyLoss())
        >>> result = influence(Explainer(network), [asked], cases, loss, [Checkpoint(network.state_dict())])
        >>> [result.training[n] for n in result.ranked(0)]  # the case of class 0 raised the score of class 0
        ['a', 'b']
    """
    run = InfluenceRun(explainer, loss, checkpoints, method, layers)
    for case in explained:
        run.explain(case)
    for case in training:
        run.add(case)
    return run.result()
