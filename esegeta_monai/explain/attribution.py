"""The result of an explanation: a map, the target it explains, and its record."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.utils import optional_import
from torch import Tensor

from esegeta_monai.engine.score import Score
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.agreement import AgreementMaps
from esegeta_monai.files.maps import save_map, save_sidecar
from esegeta_monai.files.pictures.picture import draw_picture
from esegeta_monai.files.pictures.scale import scale_of
from esegeta_monai.files.scans import Grid
from esegeta_monai.methods.base import Method
from esegeta_monai.methods.meaning import Meaning, meaning_of
from esegeta_monai.targets.base import Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from esegeta_monai.files.pictures.sketch import Sketch

__all__ = ["Attribution", "Attributions", "like_image", "mask_on_image"]


@dataclass(repr=False)
class Attribution:
    """The map of one method for one target of a case.

    Attributes:
        map: MetaTensor (C, *spatial) on the grid of the image, raw values in the network's dtype, or in float64 if it
            was computed again (``record["float64_fallback"]``); None if there is none (see ``record["status"]``).
        method, target: the objects; a target with several scores gives several attributions.
        case: index of the image in the batch.
        record: JSON-ready: status, parameters, sums, completeness gap, windows, seconds, memory, versions, warnings.
        label: the target's name with its class, for files and pictures.
        mask: bool MetaTensor (1, *spatial) of the target's voxels on the prediction's grid; None for class scores.
        input: name of the image input, if the network has several.
        error: the exception of a failed method.
        agreement: the maps of the members of an ensemble and of its mirrored views, if they were asked for.
        image: the explained image (C, *spatial), not a copy; None if there is no map.
    """

    map: MetaTensor | None
    method: Method
    target: Target
    case: int
    record: dict[str, Any]
    label: str
    mask: MetaTensor | None = None
    input: str | None = None
    error: Exception | None = None
    agreement: AgreementMaps | None = None
    image: MetaTensor | None = None

    @property
    def status(self) -> str:
        """ok, zero, incomplete, empty_target, failed or timeout."""
        return self.record["status"]

    @property
    def meaning(self) -> Meaning:
        """The meaning of the map in a sentence, and what the ends of its colours stand for."""
        method = self.method
        kind: dict[str, Any] = {"produces": method.produces, "signed": method.signed, "additive": method.additive}
        return meaning_of(type(method).__name__, **kind)

    def plot(
        self,
        *,
        convention: Literal["radiological", "neurological"] = "radiological",
        window: tuple[float, float] | None = None,
    ) -> Figure:
        """Draw three planes through the target's largest cross-sections, or the image in 2D.

        Args:
            convention: ``radiological`` (the viewer's right is the patient's left) or ``neurological``.
            window: (level, width) of the grey scale in units of the image; None: 1st to 99th percentile.

        Returns:
            A figure of matplotlib, made without pyplot: ``figure.savefig("map.png")``.

        Raises:
            UsageError: there is no map.

        Example:
            >>> from esegeta_monai import Explainer
            >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
            >>> explained = Explainer(network)(torch.rand(1, 1, 8, 8), "Saliency")
            >>> len(explained[0].plot().axes)
            2
        """
        return self._sketch(convention=convention, window=window).figure

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the map and its record, or the picture, as the suffix of the path states.

        A map (``.nii.gz``, ``.nii``, ``.nrrd``, ``.mha``) is written on the grid of the image, with its record beside
        it as JSON. Maps on the grid of a scan are written by `esegeta_monai.output.ResultWriter`. ``.png`` writes the
        picture of `plot`.

        Returns:
            The path.

        Raises:
            UsageError: there is no map, or the suffix is unknown.

        Example:
            >>> import tempfile
            >>> from esegeta_monai import Explainer
            >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
            >>> explained = Explainer(network)(torch.rand(1, 1, 8, 8), "Saliency")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = explained[0].save(f"{folder}/map.nii.gz")
            ...     sorted(file.name for file in Path(folder).iterdir())
            ['map.json', 'map.nii.gz']
        """
        path, values = Path(path), self._map()
        if path.suffix.lower() == ".png":
            self._sketch().save(path)
            return path
        if not path.name.lower().endswith(MAP_SUFFIXES):
            raise UsageError(f"{path.name}: the suffix is one of {', '.join(MAP_SUFFIXES)} (maps) or .png (pictures)")
        limit = self._limit()
        low = -limit if self.method.signed else 0.0
        save_map(path, values, Grid.of(values), method=type(self.method).__name__, cal_min=low, cal_max=limit)
        save_sidecar(path, self.record)
        return path

    def niivue(self, **options: Any) -> Any:
        """Return an interactive 3D view of image and map for a notebook, by ipyniivue (extra ``notebook``).

        Args:
            options: options of ``ipyniivue.NiiVue``.

        Raises:
            UsageError: there is no map, the image is 2D, or ipyniivue is not installed.
        """
        values, image = self._map(), self._image()
        if values.ndim != 4:
            raise UsageError("niivue() shows volumes: draw a 2D map by plot()")
        package, installed = optional_import("ipyniivue")
        if not installed:
            raise UsageError(
                'niivue() needs ipyniivue: pip install "esegeta-monai[notebook]"; plot() needs nothing more'
            )
        channel = int(values.as_tensor().abs().flatten(1).amax(1).argmax())
        limit, signed = self._limit() or 1.0, self.method.signed
        colours = {"colormap": "warm", "colormap_negative": "winter" if signed else ""}
        view = package.NiiVue(**options)
        view.load_volumes(
            [
                {"data": _nifti(image[min(channel, len(image) - 1)], image), "name": "image.nii", "colormap": "gray"},
                {
                    **{"data": _nifti(values[channel], values), "name": "map.nii", "opacity": 0.6},
                    **{"cal_min": 0.1 * limit, "cal_max": limit, **colours},
                },
            ]
        )
        return view

    def __repr__(self) -> str:
        """Name method, target, status, shape and sum."""
        parts = [f"{self.method.name or type(self.method).__name__} of {self.label}", f"case {self.case}", self.status]
        parts += [] if self.input is None else [f"input {self.input}"]
        if self.map is None:
            parts += [str(self.record["reason"])] if self.record.get("reason") else []
        else:
            parts.append("x".join(map(str, self.map.shape)))
            parts += [f"sum {self.record['sum']:.4g}"] if isinstance(self.record.get("sum"), float) else []
        return f"<Attribution: {', '.join(parts)}>"

    def _repr_html_(self) -> str:
        """Return the picture of `plot` with its caption, for notebooks; the reason if there is no map."""
        title = html.escape(f"{self.method.name or type(self.method).__name__} of {self.label}")
        if self.map is None:
            reason = html.escape(str(self.record.get("reason") or ""))
            return f"<p><b>{title}</b>: {html.escape(self.status)}. {reason}</p>"
        if self.image is None:  # made by hand
            return f"<p>{html.escape(repr(self))}</p>"
        file, meaning = io.BytesIO(), self.meaning
        self._sketch().figure.savefig(file, format="png", dpi=80)
        source = base64.b64encode(file.getvalue()).decode("ascii")
        caption = html.escape(f"{meaning.text} Status: {self.status}.")
        picture = f'<img alt="{title}" style="max-width:100%" src="data:image/png;base64,{source}">'
        return f"<figure><figcaption><b>{title}</b>. {caption}</figcaption>{picture}</figure>"

    def _map(self) -> MetaTensor:
        if self.map is None:
            reason = self.record.get("reason") or self.status
            raise UsageError(f"{type(self.method).__name__} of {self.label} has no map: {reason}")
        return self.map

    def _image(self) -> MetaTensor:
        if self.image is None:
            raise UsageError("this attribution has no image: it was made by hand; set its image, (C, *spatial)")
        return self.image

    def _limit(self) -> float:
        """Return the end of the colour scale."""
        values = self._map().detach().cpu().float().numpy()
        mask = None if self.mask is None else self.mask[0].cpu().numpy() > 0
        return scale_of(values, self.method.signed, mask).limit

    def _sketch(self, **options: Any) -> Sketch:
        values, meaning, method = self._map(), self.meaning, self.method
        image, names = self._image(), self.record.get("channel_names") or []
        sketch, _ = draw_picture(
            image,
            values,
            self.mask,
            signed=method.signed,
            case=str(self.case),
            method=method.name or type(method).__name__,
            target=self.label,
            class_name=self.record.get("class_name"),
            units=method.units,
            channel_names=names if len(names) == len(values) else None,
            caption=meaning.text,
            ends=(meaning.low, meaning.high),
            **options,
        )
        return sketch


MAP_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


def _nifti(values: Tensor, like: MetaTensor) -> bytes:
    """Return a volume (*spatial) as the bytes of a NIfTI file."""
    affine = np.asarray(to_affine_nd(3, like.affine.cpu().numpy()), dtype=np.float64)
    array = torch.as_tensor(values).as_subclass(Tensor).detach().cpu().float().numpy()
    return nib.Nifti1Image(array, affine).to_bytes()


class Attributions(Sequence[Attribution]):
    """The attributions of a call of an `esegeta_monai.Explainer`: computed when they are first read, and kept.

    Iterating computes one after the other. An index, ``len`` and ``repr`` in a notebook compute all. Maps of large
    volumes need memory while this object exists: `esegeta_monai.Explainer.stream` keeps none.

    Args:
        make: starts the computation; called at most once.

    Example:
        >>> several = Attributions(lambda: iter([]))
        >>> several
        <Attributions: none computed yet>
        >>> len(several), several
        (0, <Attributions: 0>)
    """

    def __init__(self, make: Callable[[], Iterator[Attribution]]) -> None:
        self._make: Callable[[], Iterator[Attribution]] | None = make
        self._source: Iterator[Attribution] | None = None
        self._kept: list[Attribution] = []

    def _next(self) -> bool:
        """Compute one more; return False if there is none. After an error the computation is over."""
        if self._make is not None:
            self._source, self._make = self._make(), None
        if self._source is None:
            return False
        try:
            self._kept.append(next(self._source))
        except StopIteration:
            self._source = None
            return False
        except BaseException:
            self._source = None
            raise
        return True

    def _all(self) -> list[Attribution]:
        while self._next():
            pass
        return self._kept

    def __iter__(self) -> Iterator[Attribution]:
        """Yield the attributions in order; those that are known first."""
        index = 0
        while index < len(self._kept) or self._next():
            yield self._kept[index]
            index += 1

    @overload
    def __getitem__(self, index: int) -> Attribution: ...

    @overload
    def __getitem__(self, index: slice) -> list[Attribution]: ...

    def __getitem__(self, index: int | slice) -> Attribution | list[Attribution]:
        """Return one attribution, or a list of them; all are computed first."""
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        if self._make is not None:
            return "<Attributions: none computed yet>"
        known = [f"{a.method.name} of {a.label}" for a in self._kept]
        more = "" if self._source is None else ", others not computed yet"
        return f"<Attributions: {len(known)}{': ' if known else ''}{', '.join(known)}{more}>"

    def _repr_html_(self) -> str:
        """Return the pictures of all attributions, for notebooks."""
        return "".join(a._repr_html_() for a in self._all())


def like_image(values: Tensor, image: MetaTensor) -> MetaTensor:
    """Return a map (C, *spatial) with the image's affine and preprocessing trace, without its other metadata."""
    like = MetaTensor(values.detach(), affine=image.affine.clone())
    keep = ("original_affine", "spatial_shape", "space", "filename_or_obj")
    like.meta.update({k: image.meta[k] for k in keep if k in image.meta})
    like.applied_operations = list(image.applied_operations)
    return like


def mask_on_image(score: Score | None, image: MetaTensor) -> MetaTensor | None:
    """Return the target's voxels as a bool mask (1, *spatial) on the image's grid; None if they have no place there."""
    if score is None or not score.box:
        return None
    if any(b.stop > n for b, n in zip(score.box, image.shape[1:])) or len(score.box) != image.ndim - 1:
        return None
    mask = torch.zeros((1, *image.shape[1:]), dtype=torch.bool)
    mask[0][score.box] = score.shown.cpu()
    return like_image(mask, image)
