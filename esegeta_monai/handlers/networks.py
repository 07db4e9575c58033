"""The network of an engine, or the networks of an `EnsembleEvaluator` and how it averages them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.head import Declared, Postprocessing
from esegeta_monai.engine.network.state import unwrap, weights_hash
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.explain.mean_ensemble import MeanOfMembers, read_mean
from esegeta_monai.handlers.calls import plain_inferer

__all__ = ["EngineNetworks"]


@dataclass(frozen=True)
class EngineNetworks:
    """The networks and the inferer of an engine.

    Attributes:
        networks: its network, or those of an ensemble in order.
        inferer: its inferer; of an ensemble, an `EnsembleInferer` of all networks.
        use: the use of the prediction; of an ensemble, of the mean.
        keys: keys of the predictions in the engine's output, one per network.
        mean: how an ensemble is averaged; None: there is one network.
    """

    networks: Sequence[nn.Module]
    inferer: Any
    use: Postprocessing
    keys: Sequence[str]
    mean: MeanOfMembers | None = None

    @classmethod
    def of(cls, engine: Any, transforms: Sequence[Any], pred_key: str, declared: Declared | None) -> EngineNetworks:
        """Read an engine.

        Args:
            engine: a MONAI evaluator or trainer.
            transforms: its postprocessing.
            pred_key: key of the prediction of an engine with one network.
            declared: see `Postprocessing`.

        Raises:
            UsageError: it has no network, or an ensemble that is not averaged.
        """
        single = getattr(engine, "network", None)
        if isinstance(single, nn.Module):
            use = Postprocessing.of(transforms, pred_key, declared)
            return cls([single], plain_inferer(engine), use, [pred_key])
        networks = list(getattr(engine, "networks", ()))
        if not networks or not all(isinstance(network, nn.Module) for network in networks):
            raise UsageError(
                f"{type(engine).__name__} has no network to explain: attach the handler to a SupervisedEvaluator, "
                "EnsembleEvaluator or SupervisedTrainer"
            )
        keys = [str(key) for key in engine.pred_keys]
        mean = read_mean(list(transforms), keys)
        members = [unwrap(network) for network in networks]
        inferer = EnsembleInferer(plain_inferer(engine), members, weights=mean.weights, average=mean.average)
        return cls(networks, inferer, Postprocessing.of(list(mean.after), mean.key, declared), keys, mean)

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights of all networks."""
        hashes = [weights_hash(unwrap(network)) for network in self.networks]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def predictions(self, output: Mapping[str, Any]) -> Any:
        """Return the raw prediction (B, K, *spatial) of the batch in the engine's output; of an ensemble, its mean.

        See `MeanOfMembers.of`. None where the networks of an ensemble do not return one tensor each.
        """
        raw: list[Any] = [output.get(key) for key in self.keys]
        if self.mean is None:
            return raw[0]
        if not all(isinstance(values, torch.Tensor) for values in raw):
            return None
        plain: list[Tensor] = [values.as_subclass(torch.Tensor) for values in raw]
        return self.mean.of(plain)
