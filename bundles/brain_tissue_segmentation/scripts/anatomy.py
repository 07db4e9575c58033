"""Random individuals painted from the tissue maps of the MNI152 template of nilearn.

The MNI152 template is a population average (152 heads) of skull-stripped brains. An average has blurred sulci, one
contrast and no noise; a network trained on it alone would fail on any real head. Therefore `RandIndividuald` generates
individuals: it sharpens and perturbs the tissue probabilities, derives the label from *these*, and paints an image with
random tissue intensities.

This file is the same in both brain bundles, because a MONAI bundle must be self-contained.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, RandomizableTransform
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

__all__ = ["RandIndividuald", "SeededDataset", "like", "smooth_noise", "template_case", "template_images"]

Case = dict[Hashable, Any]
SPACING_MM = 2


def template_case(folder: str | Path) -> dict[str, str]:
    """Write the MNI152 template at 2 mm below `folder` (once) and return the paths of the files.

    Returns:
        ``image``: the T1 template (a population average of a skull-stripped brain), 0 to 1;
        ``tissue``: probabilities of CSF, grey and white matter as channels, which add up to 1 inside the brain and to
        0 outside; ``label``: 0 background and CSF, 1 grey matter, 2 white matter.
    """
    root = Path(folder)
    case = {
        "image": root / "images" / "mni152_t1_2mm.nii.gz",
        "tissue": root / "maps" / "mni152_tissue_2mm.nii.gz",
        "label": root / "labels" / "mni152_t1_2mm.nii.gz",
    }
    if not all(path.exists() for path in case.values()):
        _write_template(case)
    return {key: str(path) for key, path in case.items()}


def template_images(folder: str | Path) -> str:
    """Return a folder below `folder` with the T1 template only: an input folder for inference."""
    return str(Path(template_case(folder)["image"]).parent)


def _write_template(case: Mapping[str, Path]) -> None:
    from nilearn import datasets  # imported here, because inference on other scans does not need it

    t1 = datasets.load_mni152_template(resolution=SPACING_MM)
    brain = datasets.load_mni152_brain_mask(resolution=SPACING_MM).get_fdata() > 0
    grey = datasets.load_mni152_gm_template(resolution=SPACING_MM).get_fdata().clip(0, 1) * brain
    white = datasets.load_mni152_wm_template(resolution=SPACING_MM).get_fdata().clip(0, 1) * brain
    total = np.maximum(grey + white, 1)
    tissue = np.stack([brain * (1 - (grey + white) / total), grey / total, white / total], axis=-1)
    label = tissue.argmax(-1)  # channel 0 is CSF, and outside the brain all are 0: both are class 0
    # Resampling leaves values of 1e-45 around the brain, which would count as foreground.
    for key, array in (("image", t1.get_fdata() * brain), ("tissue", tissue), ("label", label)):
        case[key].parent.mkdir(parents=True, exist_ok=True)
        dtype = np.uint8 if key == "label" else np.float32
        nib.save(nib.Nifti1Image(array.astype(dtype), t1.affine), case[key])


def smooth_noise(random: np.random.RandomState, shape: Sequence[int], cell: float, channels: int = 1) -> torch.Tensor:
    """Return noise (channels, *shape) of unit standard deviation that varies over about `cell` voxels."""
    coarse = [int(np.ceil(size / cell)) + 1 for size in shape]
    noise = torch.as_tensor(random.standard_normal((1, channels, *coarse)), dtype=torch.float32)
    noise = interpolate(noise, size=tuple(shape), mode="trilinear", align_corners=True)[0]
    return noise / noise.std()


class RandIndividuald(RandomizableTransform, MapTransform):
    r"""Paint a random individual from tissue probabilities.

    With :math:`p_c` the probabilities of CSF, grey and white matter, :math:`n_c` and :math:`t` smooth noise:

    .. math:: q_c \propto p_c^{k} \exp(s\, n_c), \qquad
        label = \arg\max_c q_c, \qquad image = (1 + 0.06\, t) \sum_c q_c\, \mu_c

    :math:`k` in 1 to 4 sharpens, :math:`s` in 0 to 1.2 makes folds and sulci individual, and the tissue intensities
    :math:`\mu` are random but in the order of T1: CSF < grey < white. With probability ``1 - prob`` the image is the
    deformed template itself with the label of the deformed maps.

    Args:
        keys: the image (1, *spatial), replaced.
        tissue_key: probabilities (3, *spatial); removed.
        label_key: written: 0 background and CSF, 1 grey, 2 white.
        brain_key: written: 1 inside the brain.
        prob: share of painted individuals.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        tissue_key: str = "tissue",
        label_key: str = "label",
        brain_key: str = "brain",
        prob: float = 0.8,
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.tissue_key, self.label_key, self.brain_key = tissue_key, label_key, brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Case:
        case = dict(data)
        tissue = torch.as_tensor(case.pop(self.tissue_key)).as_subclass(torch.Tensor)
        brain = tissue.sum(0, keepdim=True) > 0.5
        self.randomize(None)
        if self._do_transform:
            tissue = self._perturb(tissue)
        for key in self.key_iterator(case):
            image = case[key]
            painted = self._paint(tissue) if self._do_transform else image
            case[key] = like(image, painted * brain)
        case[self.label_key] = like(image, tissue.argmax(0, keepdim=True) * brain)
        case[self.brain_key] = like(image, brain)
        return case

    def _perturb(self, tissue: torch.Tensor) -> torch.Tensor:
        sharpness, strength = self.R.uniform(1, 4), self.R.uniform(0, 1.2)
        noise = smooth_noise(self.R, tissue.shape[1:], cell=self.R.uniform(1.5, 4), channels=3)
        return torch.softmax(sharpness * torch.log(tissue.clamp(0.02, 1)) + strength * noise, dim=0)

    def _paint(self, tissue: torch.Tensor) -> torch.Tensor:
        csf = self.R.uniform(0.05, 0.4)
        grey = csf + self.R.uniform(0.12, 0.45)
        white = grey + self.R.uniform(0.12, 0.45)
        levels = torch.tensor([csf, grey, white], dtype=torch.float32).reshape(3, 1, 1, 1)
        texture = smooth_noise(self.R, tissue.shape[1:], cell=self.R.uniform(2, 12))
        return (tissue * levels).sum(0, keepdim=True) * (1 + 0.06 * texture)


def like(image: torch.Tensor, values: torch.Tensor) -> MetaTensor:
    """Return `values` (C, *spatial) in float32 on the grid of `image`."""
    affine = image.affine if isinstance(image, MetaTensor) else None
    return MetaTensor(torch.as_tensor(values, dtype=torch.float32).as_subclass(torch.Tensor), affine=affine)


class SeededDataset(Dataset):
    """Random versions of one prepared case, one per seed; item i is the same in every run.

    Args:
        data: the case (a dictionary of file names), read once by `prepare`.
        prepare: deterministic transforms, run once.
        transform: random transforms (their random state is set to the item's seed).
        seeds: one item per seed. Training and validation share no seed.
    """

    def __init__(self, data: Mapping[str, Any], prepare: Any, transform: Compose, seeds: Sequence[int]) -> None:
        self.case = prepare(dict(data))
        self.transform = transform
        self.seeds = seeds

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Any:
        self.transform.set_random_state(seed=int(self.seeds[index]))
        return self.transform(dict(self.case))
