"""Class activation maps share their passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.methods import (
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    HiResCam,
    LayerCam,
    Objective,
    Saliency,
    XGradCam,
    run_together,
)
from tests.support.layers import setting
from tests.support.objectives import explain
from tests.support.tensors import close


def test_a_list_of_layers_gives_a_channel_each_in_the_same_passes():
    s = setting("UNet_batch")
    other = "model.1.submodule.0"
    one, two = (explain(GradCam(layer), s.objective).maps for layer in (s.layer, other))
    before = s.objective.context.progress.passes
    both = explain(GradCam([s.layer, other]), s.objective)
    assert s.objective.context.progress.passes - before == len(s.objective.windows) + len(s.objective.plan)
    close(both.maps, torch.cat([one, two], 1))
    assert both.note(0)["layer"] == (s.layer, other)


def test_methods_share_their_passes():
    s = setting("UNet_batch")
    methods = [GradCam(s.layer), HiResCam(s.layer), LayerCam(s.layer), XGradCam(s.layer), GradCamPlusPlus(s.layer)]
    alone = [explain(m, s.objective).maps for m in methods]
    before = s.objective.context.progress.passes
    with frozen(s.network):
        together = run_together(methods, s.objective)
    windows = len(s.objective.plan)
    assert s.objective.context.progress.passes - before == 3 * windows
    for i, maps in enumerate(alone):
        close(together[i].result.maps, maps)


def test_gradients_wait_for_the_one_that_comes_later(monkeypatch):
    """Grad-CAM++ looks at activations before it asks for gradients: one backward pass per window serves all."""
    s = setting("UNet_batch")
    methods = [Saliency(), GradCam(s.layer), EigenCam(s.layer), GradCamPlusPlus(s.layer)]
    alone = [explain(m, s.objective).maps for m in methods]
    backward = []
    vjp = Objective.vjp

    def counted(self: Objective, out: Tensor, *args: Any, **kwargs: Any) -> Any:
        backward.append(len(out))
        return vjp(self, out, *args, **kwargs)

    monkeypatch.setattr(Objective, "vjp", counted)
    before = s.objective.context.progress.passes
    with frozen(s.network):
        together = run_together(methods, s.objective)
    assert s.objective.context.progress.passes - before == 3 * len(s.objective.plan)
    assert sum(backward) == len(s.objective.windows) * s.objective.n_targets
    for i, maps in enumerate(alone):
        close(together[i].result.maps, maps)
