"""Maps of self-attention: rollout, Chefer's relevance and LeGrad, for ViT, UNETR and Swin transformers of MONAI.

They see the attention part of the network only: tokens that reach the target through skip connections from earlier
blocks, and the convolutions of a decoder, are not in them, and the maps are not shares of the target.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from esegeta_monai.engine.attention import Attention, Step, record_attention
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.layer.scattered import LayerSum

__all__ = ["AttentionRelevance", "AttentionRollout", "LeGrad"]


class _AttentionMethod(Method):
    """Base class: records the attention of each batch of windows and adds the maps of tokens over the windows."""

    produces = "layer map"
    additive = False
    full_precision = True

    @property
    def signed(self) -> bool:
        return False

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        total: list[LayerSum] = []
        start = torch.zeros(objective.n_targets, dtype=torch.float64)
        names: list[str] = []

        def run(batch: Batch) -> None:
            with torch.enable_grad(), record_attention(objective.model.network) as steps:
                out = batch.forward(batch.image.detach().requires_grad_(True))
            blocks = [s for s in steps if isinstance(s, Attention)]
            names[:] = [b.name for b in blocks]
            if len(set(names)) < len(names):
                raise MethodError(f"{self.name}: a block of attention runs several times in a pass: use LRP")
            first = blocks[0]
            total.extend([LayerSum(objective, first.name, "sum")] if not total else [])
            values = [self._weights(steps, blocks, out, c, start, k) for k, c in enumerate(batch.cotangents)]
            total[0].add(batch, _in_shape(torch.stack(values), first.output))

        objective.each([(0, w) for w in objective.windows], run)
        if not total:
            raise MethodError("the target sees no window, so there is no attention to read")
        if not bool((start > 0).any()):
            raise MethodError(f"{self.name}: the target does not depend on the attention of {names[-1]!r}")
        maps, padding = total[0].result()
        scale = torch.where(start > 0, 1 / torch.where(start > 0, start, 1.0), 0.0)
        maps = maps * scale.reshape(-1, *(1,) * (maps.ndim - 1)).to(maps)
        notes = {"layer": names[0], "blocks": len(names), "sum_in_padding": padding.cpu() * scale}
        return Explained(maps, {**notes, "start": start, "part": "attention only"})

    @abstractmethod
    def _weights(
        self,
        steps: Sequence[Step],
        blocks: Sequence[Attention],
        out: Tensor,
        cotangent: Tensor | None,
        start: Tensor,
        k: int,
    ) -> Tensor:
        """Return the weights of the first block's tokens (n, T) for one target, and add their start to ``start[k]``."""


def _in_shape(values: Tensor, output: Tensor) -> Tensor:
    """Give weights (k, n, T) the shape (k, n, …, C) of a block's output, equal shares for all channels."""
    shape = (len(values), *output.shape)
    return (values / output.shape[-1]).reshape(*shape[:-1], 1).expand(shape)


def _gradients(out: Tensor, cotangent: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return ``∂F/∂`` of each input, zeros where F does not depend on it."""
    products = torch.autograd.grad((out * cotangent).sum(), inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(products, inputs)]


class _Carried(_AttentionMethod):
    """Base class: weights of the last block's tokens, carried back to those of the first."""

    def _weights(
        self,
        steps: Sequence[Step],
        blocks: Sequence[Attention],
        out: Tensor,
        cotangent: Tensor | None,
        start: Tensor,
        k: int,
    ) -> Tensor:
        last = blocks[-1]
        if cotangent is None:
            first = blocks[0].output
            return first.new_zeros(len(first), first[0, ..., 0].numel())
        gradient, *of_matrices = _gradients(out, cotangent, [last.output, *(b.matrix for b in blocks)])
        weights = (last.output.detach() * gradient).abs().sum(-1).flatten(1)
        start[k] += weights.sum(dtype=torch.float64).cpu()
        by_block = dict(zip(map(id, blocks), of_matrices))
        reached = False
        for step in reversed(steps):
            reached |= step is last
            if not reached:  # a merging above the last block
                continue
            if isinstance(step, Attention):
                weights = self._carry(step, weights, by_block[id(step)])
            else:
                weights = step.carry(weights)
        return weights

    @abstractmethod
    def _carry(self, block: Attention, weights: Tensor, gradient: Tensor) -> Tensor:
        """Carry weights (n, T) through a block, given the gradient of its matrix."""


class AttentionRollout(_Carried):
    """``r = v Π_l ½ (I + mean over heads of A_l)``, from the last block of self-attention to the first (Abnar & Zuidema
    2020): how much each token is mixed into the tokens that the target reads.

    v are the weights of the last block's tokens in the target, ``Σ_c |z ∂F/∂z|`` over their sum in the volume: the
    class token alone where only it is read. Swin transformers mix in windows, shifted in every second block; patch
    merging counts as the mean of its tokens.

    The map is that of the attention part of the network only: skip connections and convolutions are not in it.

    Example:
        >>> AttentionRollout().signed
        False
    """

    reference = "Abnar & Zuidema, ACL 2020, arXiv:2005.00928"
    units = "share of attention"

    def _carry(self, block: Attention, weights: Tensor, gradient: Tensor) -> Tensor:
        return (weights + block.mix(weights, block.matrix.detach().mean(1))) / 2


class AttentionRelevance(_Carried):
    """``r ← r + r · mean over heads of (A_l ⊙ ∂F/∂A_l)⁺``, from the last block of self-attention to the first (Chefer
    et al. 2021): attention that speaks for the target.

    The start v, windows of Swin transformers and patch merging are those of `AttentionRollout`. The map is that of the
    attention part of the network only: skip connections and convolutions are not in it, and it is no share of a sum.

    Example:
        >>> AttentionRelevance().signed
        False
    """

    reference = "Chefer et al., ICCV 2021, arXiv:2103.15679"
    units = "relevance of attention"

    def _carry(self, block: Attention, weights: Tensor, gradient: Tensor) -> Tensor:
        return weights + block.mix(weights, (block.matrix.detach() * gradient).clamp(min=0).mean(1))


class LeGrad(_AttentionMethod):
    """``Σ_l mean over heads and queries of (∂F/∂A_l)⁺``, at the keys on the first block's grid (Bousselham et al.
    2024).

    The gradient is that of F itself in every block; the paper scores each block's tokens by the head of a contrastive
    classifier. Tokens of later stages of a Swin transformer are spread over those that they are merged from.

    The map is that of the attention part of the network only: skip connections and convolutions are not in it.

    Example:
        >>> LeGrad().signed
        False
    """

    reference = "Bousselham et al., arXiv:2404.03214"
    units = "target per unit of attention"

    def _weights(
        self,
        steps: Sequence[Step],
        blocks: Sequence[Attention],
        out: Tensor,
        cotangent: Tensor | None,
        start: Tensor,
        k: int,
    ) -> Tensor:
        first = blocks[0].output
        if cotangent is None:
            return first.new_zeros(len(first), first[0, ..., 0].numel())
        start[k] = 1.0
        gradients = dict(zip(map(id, blocks), _gradients(out, cotangent, [b.matrix for b in blocks])))
        weights: Tensor | None = None
        for step in reversed(steps):
            if isinstance(step, Attention):
                ones = step.output.new_ones(len(step.output), step.output[0, ..., 0].numel())
                positive = gradients[id(step)].clamp(min=0).mean(1)
                own = step.mix(ones, positive) / positive.shape[-1]  # mean over the queries of a window
                weights = own if weights is None else weights + own
            elif weights is not None:
                weights = step.carry(weights)
        assert weights is not None
        return weights
