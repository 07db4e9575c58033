"""Names of files: readable, safe on every file system, and never the same for two different things."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from esegeta_monai.errors import UsageError

__all__ = ["case_name", "check_clashes", "distinct_names", "map_path", "map_suffix", "safe_name"]

SCAN_SUFFIXES = (
    *(".nii.gz", ".nii", ".img.gz", ".hdr.gz", ".img", ".hdr", ".mgz", ".mgh"),
    *(".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".dicom", ".ima"),
    *(".png", ".jpeg", ".jpg", ".bmp", ".tiff", ".tif", ".npy", ".npz"),
)
MAP_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
LONGEST_PART = 60  # bytes; case, target, method, postfix and suffix together stay under the 255 of common file systems
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)  # names that Windows keeps for itself


def safe_name(text: str, longest: int = LONGEST_PART) -> str:
    """``text`` as a part of a file name: letters and digits of any script, ``_ - . + =``; all else becomes ``-``.

    A name that would be longer than ``longest`` bytes is cut and closed with eight digits of its checksum, so that two
    long names that differ only at the end stay apart. Nothing leads out of a folder, hides a file or starts an option.

    >>> [safe_name(t) for t in ("sub-01_T1w", "../x", "<img onerror=1>", "grey matter", "  ", "größe 3")]
    ['sub-01_T1w', 'x', 'img-onerror=1', 'grey-matter', 'unnamed', 'größe-3']
    """
    text = unicodedata.normalize("NFC", str(text))
    kept = "".join(c if c.isalnum() or c in "_-.+=" or unicodedata.combining(c) else "-" for c in text)
    name = re.sub(r"-*\.{2,}-*|-{2,}", "-", kept).strip("-. ") or "unnamed"
    if RESERVED.match(name):
        name = f"_{name}"
    if len(name.encode()) > longest:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{name.encode()[: longest - 9].decode('utf-8', 'ignore').rstrip('-.')}-{digest}"
    return name


def case_name(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> str:
    """The name of the case in a file or DICOM folder: the last part of the path without the suffix of its format.

    With ``root``, the folders between it and the file belong to the name, since ``patient1/T1.nii.gz`` and
    ``patient2/T1.nii.gz`` are two cases. The name is text and stays text: ``2024_01_15`` is no number.

    >>> case_name("/scans/2024_01_15.nii.gz"), case_name("scan.v2.mha"), case_name("/scans/a/T1.nii", root="/scans")
    ('2024_01_15', 'scan.v2', 'a-T1')
    """
    full = Path(os.path.abspath(path))
    name = full.name
    if not full.is_dir():
        suffix = next((s for s in SCAN_SUFFIXES if name.lower().endswith(s) and len(name) > len(s)), "")
        name = name[: len(name) - len(suffix)]
    if root is not None:
        top = Path(os.path.abspath(root))
        if top in full.parents:
            name = "-".join([*full.relative_to(top).parts[:-1], name])
    return name


def map_path(
    output_dir: str | os.PathLike[str],
    case: str,
    target: str,
    method: str,
    postfix: str = "attr",
    *,
    separate_folder: bool = True,
    extension: str = ".nii.gz",
) -> Path:
    """Where the map of a case, target and method lies: ``<output>/<case>/<case>_<target>_<Method>_attr.nii.gz``.

    Args:
        postfix: the last word of the name (a bundle's ``output_postfix``); may be empty.
        separate_folder: a folder for each case, as MONAI's ``SaveImage`` does by default.
        extension: one of `MAP_SUFFIXES`.

    Raises:
        UsageError: another extension.

    >>> map_path("out", "sub-01", "MultiClassMask-grey matter", "Saliency").as_posix()
    'out/sub-01/sub-01_MultiClassMask-grey-matter_Saliency_attr.nii.gz'
    """
    if extension not in MAP_SUFFIXES:
        raise UsageError(f"extension={extension!r}: maps are written as one of {', '.join(MAP_SUFFIXES)}")
    parts = [safe_name(part) for part in (case, target, method)]
    name = "_".join([*parts, *([safe_name(postfix, 20)] if postfix else [])])
    folder = Path(output_dir) / parts[0] if separate_folder else Path(output_dir)
    return folder / f"{name}{extension}"


def map_suffix(scan: Any) -> str:
    """The suffix of a map in the format of its scan: that of a NIfTI, NRRD or MetaImage file, else ``.nii.gz``.

    DICOM has no form for a map of real numbers that viewers agree on, and pictures have no real numbers.

    >>> [map_suffix(name) for name in ("a.NRRD", "a.nhdr", "a.mhd", "a.nii", "series", "a.png")]
    ['.nrrd', '.nrrd', '.mha', '.nii', '.nii.gz', '.nii.gz']
    """
    name = str(scan).lower() if isinstance(scan, (str, os.PathLike)) else ""
    kin = {".nhdr": ".nrrd", ".mhd": ".mha"}
    return next((kin.get(s, s) for s in (*MAP_SUFFIXES, *kin) if name.endswith(s)), ".nii.gz")


def check_clashes(
    cases: Iterable[str], targets: Iterable[str], methods: Iterable[str], *, separate_folder: bool = True
) -> None:
    """Makes sure, before any work, that no two maps would lie under one name.

    Names that differ in upper and lower case only count as the same, because on many file systems they are.

    Args:
        cases: may be empty where they come one by one; targets and methods are checked all the same.
        separate_folder: as in `map_path`; without it the names of cases can run into those of targets.

    Raises:
        UsageError: two cases, targets or methods with one name, or two combinations that meet (target ``a_b`` with
            method ``c`` and target ``a`` with method ``b_c``), naming both.
    """
    cases, targets, methods = list(cases), list(targets), list(methods)
    for kind, names in (("case", cases), ("target", targets), ("method", methods)):
        _refuse_twins([f"{kind} {n!r}" for n in names], [safe_name(n) for n in names])
    # Cases differ by now: where each has a folder of its own, or none is known yet, one stands for all.
    triples = list(product(cases if cases and not separate_folder else ["case"], targets, methods))
    of_case = "" if separate_folder else "case {!r} with "
    things = [f"{of_case.format(c)}target {t!r} and method {m!r}" for c, t, m in triples]
    _refuse_twins(things, [map_path("", c, t, m, separate_folder=False).name for c, t, m in triples])


def _refuse_twins(things: Sequence[str], files: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for thing, file in zip(things, files):
        if file.casefold() in seen:
            raise UsageError(
                f"{seen[file.casefold()]} and {thing} would both be called {file!r} and overwrite each other: "
                "rename one (a file or its folder; name= of a target or method)"
            )
        seen[file.casefold()] = thing


def distinct_names(instances: Sequence[Any]) -> list[str]:
    """A name for each method (or target): its own, and where several of one kind are given, what tells them apart.

    Args:
        instances: objects with ``name`` and ``parameters`` (dict, JSON-ready). A name that the user gave
            (``given_name``, or ``name`` other than the class's) is taken as it is.

    Parameters are added in their order, those only that separate instances further; nested ones by their last word.

    Raises:
        UsageError: two instances are equal, differ in nothing that a name can say, or were given the same name.

    Two ``Occlusion`` with ``window`` 8 and 16 become ``Occlusion-window8`` and ``Occlusion-window16``; one alone, or
    beside other methods, stays ``Occlusion``.
    """
    names = [_own_name(instance) for instance in instances]
    given = [_given_name(instance) is not None for instance in instances]
    for name in dict.fromkeys(names):
        twins = [i for i, other in enumerate(names) if other == name and not given[i]]
        if len(twins) > 1:
            for i, separated in zip(twins, _separate(name, [instances[i].parameters for i in twins])):
                names[i] = separated
    for i, name in enumerate(names):
        for j in range(i):
            if safe_name(names[j]).casefold() == safe_name(name).casefold():
                raise UsageError(
                    f"{instances[j]!r} and {instances[i]!r} would both be called {name!r}: "
                    "drop one, or give one of them another name="
                )
    return names


def _given_name(instance: Any) -> str | None:
    if hasattr(instance, "given_name"):
        return instance.given_name or None
    name = getattr(instance, "name", None)
    return name if name and name != type(instance).__name__ else None


def _own_name(instance: Any) -> str:
    return _given_name(instance) or getattr(instance, "name", None) or type(instance).__name__


def _separate(name: str, parameters: Sequence[Mapping[str, Any]]) -> list[str]:
    """``name`` followed by the parameters that tell the instances apart."""
    flat = [dict(_flatten(p)) for p in parameters]
    names = [name] * len(flat)
    for key in dict.fromkeys(key for entry in flat for key in entry):
        longer = [f"{n}-{key.rsplit('.', 1)[-1]}{_word(entry.get(key))}" for n, entry in zip(names, flat)]
        if len(set(longer)) > len(set(names)):
            names = longer
    return names


def _flatten(parameters: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in parameters.items():
        if isinstance(value, Mapping):
            # a nested object: its class under the outer key, then its parameters under their own
            yield f"{prefix}{key}", value.get("name", "")
            yield from _flatten({k: v for k, v in value.items() if k != "name"}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "x".join(_word(v) for v in value)
    return str(value)
