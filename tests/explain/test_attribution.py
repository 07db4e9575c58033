"""A map in a notebook: its 3D view."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from esegeta_monai import Explainer
from esegeta_monai.errors import UsageError


def maps(*spatial: int) -> tuple[MetaTensor, object]:
    """An image and its maps by a network of one convolution."""
    torch.manual_seed(0)
    dims = len(spatial)
    network = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(1, 2, 3, padding=1)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    image = MetaTensor(torch.rand(1, 1, *spatial), affine=affine if dims == 3 else torch.eye(3))
    return image, Explainer(network)(image, ["InputXGradient", "Saliency"], "MultiClassMask(1)")


def test_niivue_shows_image_and_map_on_one_grid(tmp_path: Path) -> None:
    ipyniivue = pytest.importorskip("ipyniivue", reason='not installed: pip install "esegeta-monai[notebook]"')
    image, explained = maps(8, 9, 10)
    for attribution, negative in zip(explained, ("winter", "")):
        view = attribution.niivue(height=300)
        assert isinstance(view, ipyniivue.NiiVue)
        below, above = view.volumes
        assert (below.colormap, above.colormap, above.colormap_negative) == ("gray", "warm", negative)
        assert 0 < above.cal_min < above.cal_max <= float(attribution.map.abs().max())
        for shown, values in ((below, image[0]), (above, attribution.map)):
            (tmp_path / "shown.nii").write_bytes(bytes(shown.data))
            read = nib.load(tmp_path / "shown.nii")
            assert np.array_equal(read.get_fdata(), values[0].numpy())
            assert np.array_equal(read.affine, np.diag([2.0, 3.0, 4.0, 1.0]))


def test_niivue_is_for_volumes_and_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    _, flat = maps(8, 9)
    with pytest.raises(UsageError, match=r"draw a 2D map by plot\(\)"):
        flat[0].niivue()
    _, explained = maps(4, 5, 6)
    monkeypatch.setattr("esegeta_monai.explain.attribution.optional_import", lambda name: (None, False))
    with pytest.raises(UsageError, match=r"needs ipyniivue: pip install \"esegeta-monai\[notebook\]\""):
        explained[0].niivue()
