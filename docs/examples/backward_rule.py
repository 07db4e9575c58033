"""Add a backward rule: relevance shared by the size of each contribution, whatever its sign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.engine.rules import Operation, Part, distribute_shares, register_rule
from esegeta_monai.methods import LRP


@register_rule
@dataclass(frozen=True)
class Absolute:
    """``R_i = Σ_j |x_i w_ij| / Σ_k |x_k w_kj| · R_j``, for convolutions and linear layers; biases receive nothing."""

    def backward(self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor]:
        """Give the multiplier m_in with R_in = x · m_in, of the operand's shape.

        Args:
            operation: the convolution or linear layer.
            operands: its input x.
            gradient: the multiplier at its output y: R_out = y · gradient.
        """
        (x,) = operands
        relevance = gradient * operation.function(x)
        sizes = Part(x.abs(), operation.argument("weight").abs())
        (per_size,) = distribute_shares(operation, [sizes], relevance, None)  # Σ_j |w_ij| R_j / Σ_k |x_k w_kj|
        return (x.sign() * per_size,)


if __name__ == "__main__":
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 2, 1, bias=False).double()  # one layer: every share is known
    image = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    method = LRP(composite={"convolution": "Absolute", "dense": "Absolute"})
    (attribution,) = Explainer(network)(image, [method], ["Box(1, (0, 0), (6, 6))"])

    with torch.no_grad():
        sizes = (image[0] * network.weight[1]).abs()
        expected = sizes / sizes.sum(0) * network(image)[0, 1]
    torch.testing.assert_close(attribution.map.as_tensor(), expected)
    print(f"relevance {float(attribution.map.sum()):.6f} = F(x) {attribution.record['value']:.6f}")
