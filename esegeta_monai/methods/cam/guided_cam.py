"""Guided backpropagation, weighted by Grad-CAM."""

from __future__ import annotations

from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.cam.gradient_cam import GradCam
from esegeta_monai.methods.gradient.guided import GuidedBackprop
from esegeta_monai.methods.run import run

__all__ = ["GuidedGradCam"]


class GuidedGradCam(Method):
    """Guided backpropagation times Grad-CAM, voxel by voxel, both of the whole volume (Selvaraju et al. 2017).

    It is as insensitive to the upper layers as guided backpropagation (Adebayo et al. 2018): do not use it alone.

    Args:
        layer: layer of Grad-CAM, see `GradCam`.
    """

    reference = "Selvaraju et al., ICCV 2017, arXiv:1610.02391"
    produces = "input map"
    additive = False
    units = "modified gradient times weighted activation"
    full_precision = True
    needs_positive = True

    layer: str | None = None

    def passes(self, objective: Objective) -> int:
        """Count the passes of both methods."""
        return GradCam(self.layer).passes(objective) + GuidedBackprop().passes(objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        cam = run(GradCam(self.layer), objective)
        return Explained(run(GuidedBackprop(), objective).maps * cam.maps, cam.notes)
