"""Heads with planted objects of known position: the data of this bundle, and a ground truth for explanations.

Half of the cases get one *lesion*: a smooth irregular blob at a random position inside the brain, brighter or darker
than its surroundings. The label states whether it is present. Two options plant further objects: a *shortcut* (a mark
in a corner outside the brain, as a scanner may leave one, that agrees with the label with a given probability) and a
*distractor* (a dark blob with the same size distribution, independent of the label; all lesions are bright in this
case). The mask of each object is part of the case, and each can be removed or added alone
(`LesionCases.with_planted`), so that experiments can determine what a network uses.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    MapTransform,
    MaskIntensityd,
    Orientationd,
    RandAdjustContrastd,
    RandAffined,
    RandBiasFieldd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    Randomizable,
    RandSmoothDeformd,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
    Spacingd,
    ThresholdIntensityd,
)
from torch.nn.functional import max_pool3d
from torch.utils.data import Dataset

from .anatomy import Case, RandIndividuald, like, smooth_noise

__all__ = ["SPATIAL_SIZE", "BrainMaskd", "LesionCases", "PlantBlobd", "PlantCornerMarkd", "prepare"]

SPACING_MM = 4
#: Excess of a bright blob over the white level, and level of a dark blob, both in units of the white level.
CONTRAST, VOID = (0.2, 0.9), (0.0, 0.1)
#: 160 x 192 x 160 mm contains a brain. The network takes all of it at once.
SPATIAL_SIZE = (40, 48, 40)


class BrainMaskd(MapTransform):
    """Write `brain`: 1 where the (skull-stripped) image is above zero."""

    def __init__(self, keys: KeysCollection = "image", brain_key: str = "brain") -> None:
        super().__init__(keys)
        self.brain_key = brain_key

    def __call__(self, data: Mapping[Hashable, Any]) -> Case:
        case = dict(data)
        for key in self.key_iterator(case):
            case[self.brain_key] = like(case[key], case[key] > 0)
        return case


def _planted(case: Mapping[Hashable, Any], key: str, default: bool) -> bool:
    """Return True if the object `key` is present: as set by an experiment on the case, else `default`."""
    return bool(case.get("planted", {}).get(key, default))


class PlantBlobd(MapTransform, Randomizable):
    r"""Plant blobs into the brain and write their mask: lesions, where `label` is 1, or distractors, in some cases.

    With :math:`d(v)` the distance from the centre in units of the three random radii (random axes are those of the
    grid; the head was turned before), :math:`n` smooth noise, :math:`m` the mean of the image under the blob and
    :math:`\ell` the blob's level:

    .. math:: \alpha(v) = \mathrm{brain}(v)\,\sigma\bigl((1 + 0.15\,n(v) - d(v)) / 0.12\bigr), \qquad
        image'(v) = (1 - \alpha)\, image + \alpha\,\bigl(\ell + 0.3\,(image - m)\bigr)

    The mask is :math:`\alpha > 0.5`. The blob is brighter than any tissue, :math:`\ell = (1 + contrast)\, white`, or a
    void, :math:`\ell = void \cdot white` without texture, where :math:`white` is the 99.5th percentile of the brain.

    Args:
        keys: the image (1, *spatial), intensities about 0 to 1.
        blob_key: written: the mask, empty if nothing is planted; ``{blob_key}_place`` is its potential position.
        share: None plants if `label` is 1; a number plants in that share of the cases, independent of the label.
        avoid_key: a mask; the blob stays one voxel away from it, and its centre the greatest radius.
        radius_mm: range of each radius.
        bright: share of bright blobs.
        contrast: range of a bright blob's excess over the white level.
        void: range of a dark blob's level, in units of the white level.
        number: range of the number of blobs, if any.
        depth_mm: least distance of the centre from the edge of the brain.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        label_key: str = "label",
        brain_key: str = "brain",
        blob_key: str = "lesion",
        share: float | None = None,
        avoid_key: str | None = None,
        radius_mm: tuple[float, float] = (8.0, 16.0),
        bright: float = 0.5,
        contrast: tuple[float, float] = CONTRAST,
        void: tuple[float, float] = VOID,
        number: tuple[int, int] = (1, 1),
        depth_mm: float = 6.0,
        spacing_mm: float = SPACING_MM,
    ) -> None:
        super().__init__(keys)
        self.label_key, self.brain_key, self.blob_key, self.avoid_key = label_key, brain_key, blob_key, avoid_key
        self.share, self.radius_mm, self.bright, self.number = share, radius_mm, bright, number
        self.contrast, self.void = contrast, void
        self.depth_mm, self.spacing_mm = depth_mm, spacing_mm

    def __call__(self, data: Mapping[Hashable, Any]) -> Case:
        case = dict(data)
        brain = torch.as_tensor(case[self.brain_key]).as_subclass(torch.Tensor)
        taken = None if self.avoid_key is None else case[self.avoid_key].as_subclass(torch.Tensor)
        mask = torch.zeros_like(brain)
        images = {key: case[key].as_subclass(torch.Tensor) for key in self.key_iterator(case)}
        by_law = bool(case[self.label_key]) if self.share is None else self.R.rand() < self.share
        present = _planted(case, self.blob_key, by_law)
        # Blobs are drawn even if none is planted, so that removing one moves no other.
        for _ in range(self.R.randint(self.number[0], self.number[1] + 1)):
            alpha = self._blob(brain, taken)
            mask = torch.maximum(mask, (alpha > 0.5).float())
            planted = {key: self._plant(image, alpha) for key, image in images.items()}
            images = planted if present else images
        case.update({key: like(case[key], image) for key, image in images.items()})
        case[f"{self.blob_key}_place"] = like(case[self.brain_key], mask)
        case[self.blob_key] = like(case[self.brain_key], mask * present)
        return case

    def _blob(self, brain: torch.Tensor, taken: torch.Tensor | None) -> torch.Tensor:
        free = _eroded(brain[0], round(self.depth_mm / self.spacing_mm))
        if taken is not None:
            free &= _dilated(taken, round(self.radius_mm[1] / self.spacing_mm))[0] == 0
            brain = brain * (1 - _dilated(taken, 1))
        places = torch.nonzero(free)
        centre = places[self.R.randint(len(places))]
        radii = [self.R.uniform(*self.radius_mm) / self.spacing_mm for _ in centre]
        # Twice the radius contains the blob up to noise of 3 standard deviations.
        box = [slice(max(int(c - 2 * r), 0), int(c + 2 * r) + 2) for c, r in zip(centre, radii)]
        alpha = torch.zeros_like(brain)
        inside = alpha[0][tuple(box)]  # a view
        axes = [
            (torch.arange(part.start, part.start + n) - c) / r
            for part, n, c, r in zip(box, inside.shape, centre, radii)
        ]
        distance = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
        noise = smooth_noise(self.R, inside.shape, cell=min(radii))[0]
        soft = torch.sigmoid((1 + 0.15 * noise - distance) / 0.12)
        inside.copy_(torch.where(soft > 0.01, soft, 0.0))  # no tail: the image changes only near the mask
        return alpha * brain

    def _plant(self, image: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        white = torch.quantile(image[image > 0], 0.995)
        mean = (image * alpha).sum() / alpha.sum()
        bright = self.R.rand() < self.bright
        level = white * (1 + self.R.uniform(*self.contrast) if bright else self.R.uniform(*self.void))
        texture = 0.3 * (image - mean) if bright else 0.0
        return (1 - alpha) * image + alpha * (level + texture)


class PlantCornerMarkd(MapTransform, Randomizable):
    """Set a bright cube in a corner of the grid, outside the brain, as a scanner may mark its images; write its mask.

    Args:
        keys: the image (1, *spatial).
        mark_key: written: 1 inside the mark, all 0 if there is none.
        agreement: probability that "mark present" equals "label is 1". 1.0 is a perfect shortcut, 0.5 is
            independent of the label.
        size: edge of the cube in voxels.
        gap: distance from the border in voxels.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        mark_key: str = "shortcut",
        agreement: float = 1.0,
        label_key: str = "label",
        size: int = 4,
        gap: int = 1,
    ) -> None:
        super().__init__(keys)
        self.mark_key, self.label_key, self.agreement = mark_key, label_key, agreement
        self.place = slice(gap, gap + size)

    def __call__(self, data: Mapping[Hashable, Any]) -> Case:
        case = dict(data)
        agrees = self.R.rand() < self.agreement
        present = _planted(case, self.mark_key, bool(case[self.label_key]) == agrees)
        for key in self.key_iterator(case):
            image = case[key].as_subclass(torch.Tensor).clone()
            mask = torch.zeros_like(image)
            if present:
                mask[:, self.place, self.place, self.place] = 1
                image[mask > 0] = 1.0
            case[self.mark_key] = like(case[key], mask)
            case[key] = like(case[key], image)
        return case


def prepare(keys: Sequence[str], spatial_size: Sequence[int] = SPATIAL_SIZE) -> Compose:
    """Return the preprocessing of inference (`preprocessing` in inference.json) for the image and maps on its grid."""
    return Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            CropForegroundd(keys, source_key="image"),
            Spacingd(keys, pixdim=(SPACING_MM,) * 3, mode="bilinear"),
            ResizeWithPadOrCropd(keys, spatial_size),
            ScaleIntensityRangePercentilesd("image", 0, 99.5, 0, 1),
            EnsureTyped(keys),
        ]
    )


class LesionCases(Dataset):
    """Heads without (`label` 0) and with (`label` 1) a planted lesion: item i depends only on ``seeds[i]``.

    An item has ``image`` (1, 40, 48, 40), ``label`` (0 or 1, equally likely, set by the seed), ``lesion`` (mask of the
    planted voxels), ``brain`` (mask), ``seed``, and the masks ``shortcut`` and ``distractor`` if requested.

    Args:
        anatomy: file names: ``image``, and ``tissue`` (see `anatomy.template_case`) to paint individuals from. Without
            ``tissue`` the image's own intensities are kept, under the same deformations, as for a real head.
        seeds: one case per seed.
        radius_mm, contrast, void, number: parameters of the lesions, see `PlantBlobd`.
        shortcut: probability that the corner mark agrees with the label; None plants no mark.
        distractor: plant a dark blob in half of the cases, independent of the label. All lesions are bright then, so
            that the two can be distinguished; their sizes have the same distribution.
        augment: False keeps position, shape and intensities of the head, so that cases differ in planted objects only.
        heads: number of different heads, which are kept in memory (0.6 MB each); None generates one per seed.
        pairs: seeds 2k and 2k + 1 are the same scan without and with a lesion; they differ in the lesion and in the
            resulting scale of the image.

    Example:
        >>> cases = LesionCases(template_case("mni152"), seeds=range(4), shortcut=1.0)   # doctest: +SKIP
        >>> cases[0]["lesion"].sum()                                                          # doctest: +SKIP
    """

    def __init__(
        self,
        anatomy: Mapping[str, str],
        seeds: Sequence[int],
        radius_mm: tuple[float, float] = (8.0, 16.0),
        contrast: tuple[float, float] = CONTRAST,
        void: tuple[float, float] = VOID,
        number: tuple[int, int] = (1, 1),
        shortcut: float | None = None,
        distractor: bool = False,
        augment: bool = True,
        heads: int | None = None,
        pairs: bool = False,
    ) -> None:
        keys = [key for key in ("image", "tissue") if key in anatomy]
        self.template = prepare(keys)({key: anatomy[key] for key in keys})
        individual = RandIndividuald("image", label_key="tissue_class", prob=0.8 if augment else 0.0)
        self.make_head = Compose(
            [*(_place(keys) if augment else []), individual if "tissue" in keys else BrainMaskd("image")]
        )
        law: dict[str, Any] = {"radius_mm": radius_mm, "contrast": contrast, "void": void}
        scan: list[Any] = [PlantBlobd(**law, number=number, bright=1.0 if distractor else 0.5)]
        other = PlantBlobd(**law, blob_key="distractor", share=0.5, avoid_key="lesion_place", bright=0.0)
        scan += [other] if distractor else []
        scan += _scanner() if augment else []
        scan += [ScaleIntensityRangePercentilesd("image", 0, 99.5, 0, 1)]
        scan += [RandAdjustContrastd("image", prob=0.5, gamma=(0.8, 1.25))] if augment else []
        scan += [] if shortcut is None else [PlantCornerMarkd(mark_key="shortcut", agreement=shortcut)]
        self.make_scan = Compose(scan)
        self.objects = {
            "lesion",
            *(["shortcut"] if shortcut is not None else []),
            *(["distractor"] if distractor else []),
        }
        self.seeds, self.heads, self.pairs = seeds, heads, pairs
        self._kept: dict[int, Case] = {}

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> Case:
        return self.with_planted(index)

    def with_planted(self, index: int, **planted: bool) -> Case:
        """Return item ``index`` with objects removed or added; label, head, noise and positions are unchanged.

        Args:
            index: index of the item.
            planted: ``lesion``, ``shortcut`` or ``distractor``: True if present.

        Raises:
            ValueError: these cases never have the object.

        Example:
            >>> cases.with_planted(0, lesion=False)["lesion"].any()                               # doctest: +SKIP
        """
        if unknown := set(planted) - self.objects:
            raise ValueError(f"{', '.join(sorted(unknown))} is not planted here: choose of {sorted(self.objects)}")
        seed = int(self.seeds[index])
        # The label has its own generator, so that it depends on the seed only, not on options that draw before it.
        label = seed % 2 if self.pairs else int(torch.randint(2, (1,), generator=torch.Generator().manual_seed(seed)))
        scan = seed // 2 if self.pairs else seed
        self.make_scan.set_random_state(seed=scan)
        case = self.make_scan({**self._head(scan), "label": label, "planted": planted})
        return {**{key: case[key] for key in ("image", "label", "brain", *sorted(self.objects))}, "seed": seed}

    def _head(self, seed: int) -> Case:
        if self.heads is None:
            return self._make_head(seed)
        seed %= self.heads
        if seed not in self._kept:
            self._kept[seed] = self._make_head(seed)
        return dict(self._kept[seed])

    def _make_head(self, seed: int) -> Case:
        self.make_head.set_random_state(seed=seed)
        head = self.make_head(dict(self.template))
        return {"image": head["image"], "brain": head["brain"]}


def _eroded(mask: torch.Tensor, depth: int) -> torch.Tensor:
    """Voxels whose six neighbours at distance `depth` along the axes are inside the mask as well."""
    inside = mask > 0
    for axis in range(mask.ndim):
        for step in (-depth, depth):
            inside = inside & (torch.roll(mask, step, axis) > 0)
    return inside


def _dilated(mask: torch.Tensor, depth: int) -> torch.Tensor:
    """A mask (1, *spatial) with all voxels added that lie in a cube of `depth` voxels round one of it."""
    for axis in range(3):  # one axis after the other: the same cube at a fraction of the cost
        wide = [2 * depth + 1 if axis == other else 1 for other in range(3)]
        mask = max_pool3d(mask, wide, 1, [size // 2 for size in wide])
    return mask


def _place(keys: Sequence[str]) -> list[Any]:
    return [
        RandFlipd(keys, prob=0.5, spatial_axis=0),
        RandAffined(
            keys,
            prob=0.9,
            rotate_range=(0.3, 0.3, 0.3),
            shear_range=(0.1,) * 3,
            translate_range=(2, 2, 2),
            scale_range=((-0.1, 0.2),) * 3,
            padding_mode="zeros",
        ),
        RandSmoothDeformd(
            keys,
            spatial_size=SPATIAL_SIZE,
            rand_size=(7, 8, 7),
            prob=0.7,
            def_range=0.08,
            field_mode="trilinear",
            grid_mode="bilinear",
            grid_padding_mode="zeros",
        ),
    ]


def _scanner() -> list[Any]:
    return [
        RandBiasFieldd("image", prob=0.7, degree=2, coeff_range=(-0.1, 0.1)),
        RandGaussianSmoothd("image", prob=0.4, sigma_x=(0.2, 0.5), sigma_y=(0.2, 0.5), sigma_z=(0.2, 0.5)),
        RandGaussianNoised("image", prob=0.7, std=0.05),
        ThresholdIntensityd("image", threshold=0.0, above=True, cval=0.0),  # noise made negative values
        MaskIntensityd("image", mask_key="brain"),
    ]
