"""Every method of the registry that yields a map, with the parameters that fit a grid of 40 x 48 x 40 voxels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from esegeta_monai.methods import METHODS, Method

__all__ = ["chosen_methods", "is_dear"]

#: Methods that need hundreds of passes and more a case: they run on fewer cases.
DEAR: dict[str, list[str]] = {
    "ExtremalPerturbation": ["ExtremalPerturbation(areas=0.005)"],
    "FeatureAblation": ["FeatureAblation"],
    "FeaturePermutation": [],  # built with cases, below
    "Hsic": ["Hsic(n_samples=512)"],
    "KernelShap": ["KernelShap"],
    "Lime": ["Lime(n_samples=512)"],
    "Occlusion": [
        "Occlusion(window=8, stride=4)",
        "Occlusion(window=8, stride=4, baseline='blur', name='Occlusion-blur')",
    ],
    "Rise": ["Rise(n_masks=512)"],
    "ShapleyValueSampling": ["ShapleyValueSampling(n_samples=8)"],
    "Sobol": ["Sobol(n_samples=8, grid=5)"],
}

#: Where the defaults do not serve: an activation's guided gradient and a layer's conductance are of one channel each.
CHEAP: dict[str, list[str]] = {}


def is_dear(method: Method) -> bool:
    """Whether a method runs on fewer cases."""
    return type(method).__name__ in DEAR


def chosen_methods(others: Sequence[Tensor]) -> list[Method]:
    """All methods; ``others`` are images (1, *spatial) that `FeaturePermutation` exchanges features with."""
    methods: list[Method] = []
    for cls in METHODS:
        if cls.produces == "synthesised image" or cls.__name__ == "ChannelShapley":
            continue  # no map of this case; one channel has no shares
        texts = DEAR.get(cls.__name__, CHEAP.get(cls.__name__, [cls.__name__]))
        methods += METHODS.create_all(texts) if texts else []
    methods.append(METHODS.get("FeaturePermutation")(cases=list(others)))
    return methods
