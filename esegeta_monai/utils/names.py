"""File names that are readable, valid on every file system, and distinct for distinct items."""

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

__all__ = [
    "case_name",
    "check_clashes",
    "distinct_names",
    "map_path",
    "map_suffix",
    "one_line",
    "plain_key",
    "safe_name",
]

SCAN_SUFFIXES = (
    *(".nii.gz", ".nii", ".img.gz", ".hdr.gz", ".img", ".hdr", ".mgz", ".mgh"),
    *(".nrrd", ".nhdr", ".mha", ".mhd", ".dcm", ".dicom", ".ima"),
    *(".png", ".jpeg", ".jpg", ".bmp", ".tiff", ".tif", ".npy", ".npz"),
)
MAP_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
LONGEST_PART = 60  # bytes; case, target, method, postfix and suffix together stay under the 255 of common file systems
RESERVED = re.compile(  # by Windows, and for the files that an output folder has beside its cases
    r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)|(run(\..*)?\.jsonl?(\.unreadable)?|esegeta\.log|index\.html|metrics\.csv)$",
    re.IGNORECASE,
)


def plain_key(name: str) -> str:
    """Return a name as registries compare names: in lower case, without ``-`` and ``_``.

    >>> plain_key("Grad-Cam") == plain_key("grad_cam")
    True
    """
    return name.replace("-", "").replace("_", "").lower()


def safe_name(text: str, longest: int = LONGEST_PART) -> str:
    """Convert text to a part of a file name: letters and digits of any script and ``_ - . + =``; others become ``-``.

    A name longer than ``longest`` bytes is cut and ends in eight digits of its checksum, so that long names that differ
    only at the end stay distinct. No name leads out of a folder, hides a file, starts an option, or is that of a file
    which an output folder has beside its cases (``run.json``). Letters that the locale's file names cannot hold become
    ``-`` too.

    >>> [safe_name(t) for t in ("sub-01_T1w", "../x", "<img onerror=1>", "grey matter", "  ", "run.json")]
    ['sub-01_T1w', 'x', 'img-onerror=1', 'grey-matter', 'unnamed', '_run.json']
    """
    text = unicodedata.normalize("NFC", str(text))
    kept = "".join(c if _fits_a_file_name(c) else "-" for c in text)
    name = re.sub(r"-*\.{2,}-*|-{2,}", "-", kept).strip("-. ") or "unnamed"
    if RESERVED.match(name):
        name = f"_{name}"
    if len(name.encode()) > longest:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        name = f"{name.encode()[: longest - 9].decode('utf-8', 'ignore').rstrip('-.')}-{digest}"
    return name


def _fits_a_file_name(character: str) -> bool:
    if not (character.isalnum() or character in "_-.+=" or unicodedata.combining(character)):
        return False
    try:
        os.fsencode(character)
    except UnicodeEncodeError:  # an ASCII locale
        return False
    return True


def one_line(text: str) -> str:
    r"""Replace control characters and line breaks, which could forge a line of a log, by spaces.

    Bytes of a file name that the locale could not decode (lone surrogates) become text if they are UTF-8, else escapes.

    >>> one_line("a\n2026-01-01 ERROR: b\x1b[31m")
    'a 2026-01-01 ERROR: b [31m'
    """
    if any("\ud800" <= c <= "\udfff" for c in text):
        text = "".join(c if c < "\ud800" or c > "\udfff" or "\udc80" <= c <= "\udcff" else "?" for c in text)
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def case_name(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> str:
    """Return the case name of a file or DICOM folder: the last part of the path without the suffix of its format.

    With ``root``, the folders between it and the file belong to the name, because ``patient1/T1.nii.gz`` and
    ``patient2/T1.nii.gz`` are two cases. The name is always text: ``2024_01_15`` is not read as a number. It is one
    line (`one_line`).

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
    return one_line(name)


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
    """Return the path of a map: ``<output>/<case>/<case>_<target>_<Method>_attr.nii.gz``.

    Args:
        output_dir: the output folder.
        case, target, method: names, converted by `safe_name`.
        postfix: last word of the name (a bundle's ``output_postfix``); may be empty.
        separate_folder: True: one folder per case, the default of MONAI's ``SaveImage``.
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
    """Return the suffix of a map in the format of its scan: that of a NIfTI, NRRD or MetaImage file, else ``.nii.gz``.

    DICOM maps are written beside NIfTI (`esegeta_monai.files.dicom_out`), and picture formats have no real values.

    >>> [map_suffix(name) for name in ("a.NRRD", "a.nhdr", "a.mhd", "a.nii", "series", "a.png")]
    ['.nrrd', '.nrrd', '.mha', '.nii', '.nii.gz', '.nii.gz']
    """
    name = str(scan).lower() if isinstance(scan, (str, os.PathLike)) else ""
    kin = {".nhdr": ".nrrd", ".mhd": ".mha"}
    return next((kin.get(s, s) for s in (*MAP_SUFFIXES, *kin) if name.endswith(s)), ".nii.gz")


def check_clashes(
    cases: Iterable[str], targets: Iterable[str], methods: Iterable[str], *, separate_folder: bool = True
) -> None:
    """Check before a run that no two maps have the same file name.

    Names that differ only in case count as equal, as on many file systems.

    Args:
        cases: names of the cases; may be empty if they are not known in advance.
        targets, methods: names of the targets and methods.
        separate_folder: as in `map_path`; without it, names of cases and targets can form the same file name.

    Raises:
        UsageError: two cases, targets or methods with one name, or two combinations with one file name (target ``a_b``
            with method ``c`` and target ``a`` with method ``b_c``); the message names both.
    """
    cases, targets, methods = list(cases), list(targets), list(methods)
    for kind, names in (("case", cases), ("target", targets), ("method", methods)):
        _check_distinct([f"{kind} {n!r}" for n in names], [safe_name(n) for n in names])
    # Cases are distinct here: if each has its own folder, or none is known yet, checking one suffices.
    triples = list(product(cases if cases and not separate_folder else ["case"], targets, methods))
    of_case = "" if separate_folder else "case {!r} with "
    things = [f"{of_case.format(c)}target {t!r} and method {m!r}" for c, t, m in triples]
    _check_distinct(things, [map_path("", c, t, m, separate_folder=False).name for c, t, m in triples])


def _check_distinct(things: Sequence[str], files: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for thing, file in zip(things, files):
        if file.casefold() in seen:
            raise UsageError(
                f"{seen[file.casefold()]} and {thing} would both be called {file!r} and overwrite each other: "
                "rename one (a file or its folder; name= of a target or method)"
            )
        seen[file.casefold()] = thing


def distinct_names(instances: Sequence[Any]) -> list[str]:
    """Return a distinct name per method (or target): its own name, and parameters if several have the same name.

    Two ``Occlusion`` with ``window`` 8 and 16 become ``Occlusion-window8`` and ``Occlusion-window16``; a single one, or
    one beside other methods, stays ``Occlusion``. Parameters are added in their order if they separate instances
    further; nested parameters by the last part of their key.

    Args:
        instances: objects with ``name`` and ``parameters`` (dict, JSON-ready). A name that the user gave
            (``given_name``, or ``name`` other than that of the class) is not changed.

    Raises:
        UsageError: two instances are equal, differ in no parameter that a name can contain, or have the same given
            name.
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
    """Append the parameters that distinguish the instances to ``name``."""
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
            # a nested object: its class under the outer key, then its parameters under their keys
            yield f"{prefix}{key}", value.get("name", "")
            yield from _flatten({k: v for k, v in value.items() if k != "name"}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "x".join(_word(v) for v in value)
    return str(value)
