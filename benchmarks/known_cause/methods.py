"""Every method of the registry that yields a map, with parameters for a grid of 40 x 48 x 40 voxels."""

from __future__ import annotations

from causes import Cause

from esegeta_monai.methods import METHODS, Method

__all__ = ["chosen_methods", "is_expensive"]

#: Methods with hundreds of passes or more per case; they run on fewer cases.
EXPENSIVE: dict[str, list[str]] = {
    "ExtremalPerturbation": ["ExtremalPerturbation(areas=0.005)"],
    "FeatureAblation": ["FeatureAblation"],
    "FeaturePermutation": [],
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


def is_expensive(method: Method) -> bool:
    """Return True if a method runs on fewer cases."""
    return type(method).__name__ in EXPENSIVE


def chosen_methods(cause: Cause) -> list[Method]:
    """Return all methods.

    `FeaturePermutation` exchanges features with cases without the cause. Patterns are fitted on cases with and without
    it, because a neuron's pattern describes how the data vary with it.
    """
    healthy, ill = (cause.others(label) for label in (0, 1))
    cases = {
        "FeaturePermutation": healthy,
        "PatternAttribution": [*healthy, *ill],
        "PatternNet": [*healthy, *ill],
    }
    methods: list[Method] = []
    for cls in METHODS:
        if cls.produces == "synthesised image" or cls.__name__ == "ChannelShapley":
            continue  # no map of a case; a single channel has no shares
        if cls.__name__ in cases:
            methods.append(cls(cases=cases[cls.__name__]))  # type: ignore[call-arg]
        else:
            methods += METHODS.create_all(EXPENSIVE.get(cls.__name__, [cls.__name__]))
    return methods
