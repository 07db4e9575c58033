"""Convert MONAI's trace of a preprocessing to resampling steps.

Every geometric transform of MONAI, including permutations, crops and pads, has the form

    x_out(i) = Σ_j k(X i − j) x_in(j)

``X`` transforms voxel indices of the output grid to the input grid, ``k`` is the interpolation kernel, and a padding
rule defines values outside the input. :func:`steps` reads these forms from ``MetaTensor.applied_operations``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from monai.data.utils import to_affine_nd
from monai.transforms import Affine
from monai.transforms.lazy.utils import requires_interp
from monai.transforms.utils import create_translate, scale_affine
from monai.utils import LazyAttr, TraceKeys, convert_to_numpy
from nibabel.orientations import inv_ornt_aff, io_orientation, ornt_transform

from esegeta_monai.errors import InputError

__all__ = ["SizeChangedError", "Step", "steps"]


class SizeChangedError(InputError):
    """A transform without a record changed the size of the image between, or after, those of the trace."""


# Names of the same padding rule in MONAI, torch, numpy and scipy.
PADDINGS = {
    **dict.fromkeys(("zeros", "constant", "grid-constant"), "zeros"),
    **dict.fromkeys(("border", "nearest", "edge", "replicate"), "border"),
    **dict.fromkeys(("mirror",), "mirror"),  # about the centre of the border voxel, which is not repeated
    **dict.fromkeys(("reflection", "reflect", "grid-mirror", "symmetric"), "reflection"),  # about its outer edge
    **dict.fromkeys(("wrap", "grid-wrap", "circular"), "wrap"),
}


@dataclass(frozen=True)
class Step:
    """A forward resampling step ``x_out(i) = Σ_j k(X i − j) x_in(j)``.

    Attributes:
        name: class of the traced transform.
        xform: X, (r + 1, r + 1) float64, voxel index of the output grid to that of the input grid.
        size_in, size_out: spatial shapes.
        padding: rule outside the input: ``zeros``, ``border``, ``mirror``, ``reflection`` or ``wrap``.
        kernel: ``linear``, ``nearest`` (the voxel nearest to X i), ``area`` (the mean over the voxels that the output
            voxel covers), ``floor`` and ``round`` (``nearest`` and ``nearest-exact`` of torch's ``interpolate``).
    """

    name: str
    xform: np.ndarray
    size_in: tuple[int, ...]
    size_out: tuple[int, ...]
    padding: str = "zeros"
    kernel: str = "linear"
    tracked: np.ndarray | None = None
    """The matrix by which MONAI multiplied the image's affine, if it is not X."""

    @property
    def is_identity(self) -> bool:
        return self.size_in == self.size_out and np.array_equal(self.xform, np.eye(len(self.xform)))


def steps(
    operations: Sequence[Mapping[str, Any]], size: Sequence[int], affine: torch.Tensor
) -> tuple[list[Step], torch.Tensor]:
    """Return the forward steps of ``operations``, **last first**, and the affine of the grid before all of them.

    Args:
        operations: ``applied_operations`` of a MetaTensor.
        size: spatial shape of the grid after all of them.
        affine: that grid's voxel-to-world matrix, float64.

    Raises:
        InputError: a transform has an unknown geometry or is not invertible.
    """
    result: list[Step] = []
    size_out = _ints(size)
    atoms = [atom for operation in operations for atom in _atoms(operation)]
    while atoms:
        record = atoms.pop()
        if record.get(TraceKeys.LAZY):
            # MONAI multiplies the pending matrices and resamples once, so they are one step here too.
            group = [record]
            while atoms and atoms[-1].get(TraceKeys.LAZY) and not _looks_at_data(group[0]):
                group.insert(0, atoms.pop())
            step: Step | None = _lazy(group, size_out)
        else:
            step = _eager(record, size_out, affine)
        if step is None:
            continue
        if np.linalg.matrix_rank(step.xform) < len(step.xform):
            raise InputError(
                f"{step.name} maps the scan's grid {step.size_in} to {size_out} by a singular matrix, "
                "which has no inverse: change that transform"
            )
        back = torch.as_tensor(np.linalg.inv(step.xform if step.tracked is None else step.tracked))
        affine = affine @ to_affine_nd(len(affine) - 1, back, dtype=torch.float64)
        size_out = step.size_in
        result.append(step)
    return result, affine


def _atoms(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the simple records inside ``record`` in order of application; inactive random transforms have none."""
    extra = record.get(TraceKeys.EXTRA_INFO) or {}
    if record.get(TraceKeys.LAZY):
        yield record
    elif not (record.get(TraceKeys.DO_TRANSFORM, True) or extra.get("do_resampling")):
        return
    elif TraceKeys.CLASS_NAME in extra:  # a random transform wraps the applied one
        yield from _atoms(extra)
    else:
        if "crop_info" not in extra:  # ResizeWithPadOrCrop consists of its two parts
            yield record
        for part in ("crop_info", "pad_info", "padcrop"):
            if extra.get(part):
                yield from _atoms(extra[part])


def _lazy(group: Sequence[Mapping[str, Any]], size_out: tuple[int, ...]) -> Step:
    rank = len(size_out)
    xform = np.eye(rank + 1)
    for record in group:
        xform = xform @ convert_to_numpy(to_affine_nd(rank, record[LazyAttr.AFFINE]))
    moves_only = requires_interp(xform) is not None
    name = " + ".join(str(record[TraceKeys.CLASS_NAME]) for record in group)
    if not moves_only and any(_pads(record) for record in group[1:]):
        warnings.warn(
            f"{name} were lazy, and the trace does not state whether MONAI applied them in one step. One step is "
            "assumed, so padded voxels count as repeated border voxels; without lazy=True the padding is recorded",
            stacklevel=2,
        )
    # apply_pending crops and pads with zeros if no interpolation is needed, else it samples with border padding.
    # Overrides given to Compose(overrides=…) are not in the trace.
    return Step(
        name=name,
        xform=np.round(xform) if moves_only else xform,
        size_in=_ints(group[0][TraceKeys.ORIG_SIZE]),
        size_out=size_out,
        padding="zeros" if moves_only else "border",
    )


def _looks_at_data(record: Mapping[str, Any]) -> bool:
    """Return True if the dictionary transform reads voxel values, so that pending transforms are applied first."""
    name = str(record[TraceKeys.CLASS_NAME])
    return name.startswith(("CropForeground", "RandCropByPosNegLabel", "RandCropByLabelClasses"))


def _pads(record: Mapping[str, Any]) -> bool:
    extra = record.get(TraceKeys.EXTRA_INFO) or {}
    extra = (extra.get("pad_info") or {}).get(TraceKeys.EXTRA_INFO, extra)
    return bool(np.any(extra.get("padded", 0)))


def _eager(record: Mapping[str, Any], size_out: tuple[int, ...], affine: torch.Tensor) -> Step | None:
    name, extra = str(record[TraceKeys.CLASS_NAME]), record.get(TraceKeys.EXTRA_INFO) or {}
    size_in = _ints(record[TraceKeys.ORIG_SIZE])
    if len(size_in) == len(size_out):
        for key, read in _READERS.items():
            if key in extra:
                return read(name, extra, size_in, size_out, affine)
    if name in ("Lambda", "RandLambda") and size_in == size_out:
        warnings.warn(f"{name} is assumed to change intensities only: the trace has no geometry of it", stacklevel=2)
        return None
    raise InputError(
        f"the adjoint of {name} is not known: for a map that is not additive use Invertd, "
        "for an additive one remove the transform from the preprocessing"
    )


def _crop(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    rank = len(size_in)
    starts = [float(start) for start in extra["cropped"][0 : 2 * rank : 2]]
    ends = extra["cropped"][1 : 2 * rank : 2]
    _check_size(name, [n - int(a) - int(b) for n, a, b in zip(size_in, starts, ends)], size_out)
    return Step(name, np.asarray(create_translate(rank, starts)), size_in, size_out)


def _pad(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    channels, *borders = [tuple(int(b) for b in border) for border in extra["padded"]]
    if any(channels):
        raise InputError(f"{name} padded channels, which cannot be inverted: remove it from the preprocessing")
    mode = str(extra["mode"])
    # numpy's and torch's "reflect" is scipy's "mirror", while scipy's "reflect" repeats the border voxel
    padding = "mirror" if mode == "reflect" else PADDINGS.get(mode)
    if padding is None:
        raise InputError(
            f"{name} with mode={mode!r} has no known adjoint: use constant, edge, reflect, symmetric or wrap, "
            "or Invertd for a map that is not additive"
        )
    _check_size(name, [n + sum(border) for n, border in zip(size_in, borders)], size_out)
    shift = np.asarray(create_translate(len(size_in), [-float(border[0]) for border in borders]))
    return Step(name, shift, size_in, size_out, padding)


def _orientation(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    rank = len(size_in)
    affines = [convert_to_numpy(to_affine_nd(rank, a)) for a in (extra["original_affine"], affine)]
    before, after = (io_orientation(a) for a in affines)
    return _moved(name, inv_ornt_aff(ornt_transform(before, after), size_in), size_in, size_out)


def _rotate90(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    rank, size = len(size_in), list(size_in)
    a, b = (axis % rank for axis in extra["axes"])
    xform = np.eye(rank + 1)
    for _ in range(extra["k"] % 4):  # one quarter turn: out(i_a, i_b) = in(i_b, n_b − 1 − i_a)
        turn = np.eye(rank + 1)
        turn[[a, b]] = 0.0
        turn[a, b], turn[b, a], turn[b, -1] = 1.0, -1.0, size[b] - 1
        xform = xform @ turn
        size[a], size[b] = size[b], size[a]
    return _moved(name, xform, size_in, size_out)


def _flip(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    rank, axes = len(size_in), extra["axes"]
    xform = np.eye(rank + 1)
    for axis in range(rank) if axes is None else np.atleast_1d(axes):
        xform[axis % rank, axis % rank], xform[axis % rank, -1] = -1.0, size_in[axis] - 1
    return _moved(name, xform, size_in, size_out)


def _moved(name: str, xform: np.ndarray, size_in: tuple, size_out: tuple) -> Step:
    """Return a step that exchanges and flips whole axes.

    Raises:
        SizeChangedError: the sizes of input and output do not fit it.
    """
    _check_size(name, [size_in[int(np.abs(xform[:-1, k]).argmax())] for k in range(len(size_in))], size_out)
    return Step(name, xform, size_in, size_out)


def _check_size(name: str, expected: Sequence[int], size_out: Sequence[int]) -> None:
    """Check that a step gave as many voxels along each axis as the next one got.

    Raises:
        SizeChangedError: it did not.
    """
    if tuple(expected) != tuple(size_out):
        planned, given = ("x".join(map(str, size)) for size in (expected, size_out))
        raise SizeChangedError(f"{name} gave {planned} voxels, but a transform without a record made {given} of them")


def _spatial_resample(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    rank = len(size_in)
    source, target = (convert_to_numpy(to_affine_nd(rank, a)) for a in (extra["src_affine"], affine))
    return _sampled(name, extra, np.linalg.solve(source, target), size_in, size_out)


def _rotate(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    return _sampled(name, extra, convert_to_numpy(extra["rot_mat"]), size_in, size_out)


def _affine(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    if not extra["do_resampling"]:
        return Step(name, np.eye(len(size_in) + 1), size_in, size_out)
    matrix = convert_to_numpy(extra["affine"]).astype(np.float64)
    tracked = Affine.compute_w_affine(len(size_in), matrix, size_in, size_out)
    if extra.get("align_corners") is not True:
        return _sampled(name, extra, tracked, size_in, size_out)
    # Affine(align_corners=True) samples by one matrix and moves the image's affine by another.
    xform = Affine.compute_w_affine(len(size_in), matrix, size_in, size_out, align_corners=True)
    return replace(_sampled(name, extra, xform, size_in, size_out), tracked=tracked)


def _resize(name: str, extra: Mapping, size_in: tuple, size_out: tuple, affine: torch.Tensor) -> Step:
    mode = str(extra["mode"])
    kernel = {"area": "area", "nearest": "floor", "nearest-exact": "round"}.get(mode, "linear")
    xform = scale_affine(size_in, size_out, align_corners=extra["align_corners"] is True)
    return Step(name, convert_to_numpy(xform).astype(np.float64), size_in, size_out, "border", kernel)


def _sampled(name: str, extra: Mapping, xform: np.ndarray, size_in: tuple, size_out: tuple) -> Step:
    padding = PADDINGS[str(extra["padding_mode"])]
    if padding == "reflection" and extra.get("align_corners") is True:
        padding = "mirror"
    kernel = "nearest" if str(extra["mode"]) in ("nearest", "0") else "linear"
    return Step(name, xform.astype(np.float64), size_in, size_out, padding, kernel)


# A record is recognised by its content, so that subclasses and random variants are read like their parents.
_READERS: dict[str, Callable[..., Step]] = {
    "cropped": _crop,
    "padded": _pad,
    "original_affine": _orientation,
    "src_affine": _spatial_resample,
    "rot_mat": _rotate,
    "k": _rotate90,
    "axes": _flip,
    "do_resampling": _affine,
    "new_dim": _resize,
    "do_padcrop": _resize,
}


def _ints(size: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in size)
