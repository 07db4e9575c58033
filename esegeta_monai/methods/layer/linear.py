"""The linear approximation of the network above a layer."""

from __future__ import annotations

from esegeta_monai.methods.layer.gradient import LayerGradientXActivation

__all__ = ["LinearApproximation"]


class LinearApproximation(LayerGradientXActivation):
    """``Σ_c A_c(p) · ∂F/∂A_c(p)``: each position's part of the first-order approximation of F above the layer
    (``linear_approx`` of TorchRay).

    It is `LayerGradientXActivation` summed over channels, and `HiResCam` before ReLU.
    """

    reference = "Fong et al., ICCV 2019 (TorchRay), arXiv:1910.08485"
