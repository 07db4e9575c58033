"""Paths of the files of a run in its output folder: the plain layout, or BIDS derivatives.

    plain   CASE/CASE_TARGET_METHOD_attr.nii.gz        CASE/CASE_TARGET_mask.nii.gz
    bids    sub-01[/ses-1]/anat/sub-01[_ses-1]_mod-T1w_label-TARGET_desc-METHOD_attr.nii.gz
            sub-01[/ses-1]/anat/sub-01[_ses-1]_label-TARGET_desc-T1w_mask.nii.gz

BIDS (https://bids-specification.readthedocs.io, derivatives) has no suffix for maps of this kind, so ``.bidsignore``
names ``attr``, with the other files that BIDS does not know. The file
``dataset_description.json`` marks a folder of the layout ``bids``.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from esegeta_monai.errors import UsageError
from esegeta_monai.files.copies import mask_path, scan_copy_path
from esegeta_monai.utils.files import VERSION, atomic, read_json, write_json
from esegeta_monai.utils.names import LONGEST_PART, MAP_SUFFIXES, map_path, safe_name

__all__ = ["LAYOUTS", "Layout", "LayoutName", "choose_layout", "same_layout"]

LayoutName = Literal["plain", "bids"]
LAYOUTS: tuple[LayoutName, ...] = ("plain", "bids")
BIDS_VERSION = "1.10.0"
GENERATOR = "esegeta-monai"
DESCRIPTION = "dataset_description.json"
README = """Maps of what a network looks at, computed by esegeta-monai (research only, not a medical device).

sub-*/**/*_attr.nii.gz are the maps; label- is the target, desc- the method, mod- the suffix of the scan.
The JSON file beside a map has all parameters. *_mask.nii.gz marks the voxels of a target.
"""
ENTITIES = (
    *("sub", "ses", "sample", "task", "tracksys", "acq", "nuc", "voi", "ce", "trc", "stain", "rec", "dir", "run"),
    *("mod", "echo", "flip", "inv", "mt", "part", "proc", "hemi", "space", "split", "recording", "chunk", "atlas"),
    *("seg", "scale", "res", "den", "label", "desc"),
)
"""Entities in the order of the schema (BIDS 1.11)."""
DATATYPES = {"dwi": "dwi", "bold": "func", "cbv": "func"}
"""Folder of a suffix; all others are in ``anat``."""
NOT_BIDS = (
    *("run*.json*", "esegeta.log*", "*.csv", "*.html", "*.png", "*.dcm", "*_metrics.json", "*_regions.json"),
    *("*_scan.nii.gz", "*_seg*", "cohort/", ".metrics.lock", ".scores/"),
)
_NAME = re.compile(r"(?:^|-)(sub-([0-9a-zA-Z+]+)(?:_[a-z]+-[0-9a-zA-Z+]+)*(?:_[0-9a-zA-Z]+)?)$")


@dataclass(frozen=True)
class Layout:
    """The places of a run's files.

    Args:
        folder: the output folder.
        bids: True: BIDS derivatives.
        separate_folder: of the plain layout: one folder per case, see `esegeta_monai.utils.names.map_path`.

    >>> Layout(Path("out")).map("sub-01_T1w", "MultiClassMask-1", "Saliency").as_posix()
    'out/sub-01_T1w/sub-01_T1w_MultiClassMask-1_Saliency_attr.nii.gz'
    >>> Layout(Path("out"), bids=True).map("sub-01_ses-2_T1w", "MultiClassMask-1", "Saliency").as_posix()
    'out/sub-01/ses-2/anat/sub-01_ses-2_mod-T1w_label-MultiClassMask1_desc-Saliency_attr.nii.gz'
    """

    folder: Path
    bids: bool = False
    separate_folder: bool = True

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> Layout:
        """Return the layout that an output folder has."""
        return cls(Path(folder), _generator(Path(folder)) == GENERATOR)

    def map(self, case: str, target: str, method: str, postfix: str = "attr", extension: str = MAP_SUFFIXES[0]) -> Path:
        """Return the path of a map; see `esegeta_monai.utils.names.map_path`."""
        if not self.bids:
            options: dict[str, Any] = {"separate_folder": self.separate_folder, "extension": extension}
            return map_path(self.folder, case, target, method, postfix, **options)
        entities, suffix = _entities(case)
        given = {**entities, **({"mod": suffix} if suffix else {}), "label": _value(target), "desc": _value(method)}
        return self._anat(case) / f"{_joined(given)}_{_value(postfix or 'attr')}{extension}"

    def mask(self, case: str, target: str) -> Path:
        """Return the path of the mask of a target."""
        if not self.bids:
            return mask_path(self.folder, case, target, separate_folder=self.separate_folder)
        entities, suffix = _entities(case)
        given = {**entities, "label": _value(target), **({"desc": suffix} if suffix else {})}
        return self._anat(case) / f"{_joined(given)}_mask.nii.gz"

    def scan_copy(self, case: str) -> Path:
        """Return the path of the copy of a scan."""
        if not self.bids:
            return scan_copy_path(self.folder, case, separate_folder=self.separate_folder)
        return self.beside(case, "scan.nii.gz")

    def beside(self, case: str, what: str) -> Path:
        """Return the path of another file of a case, such as ``report.html``.

        >>> [Layout(Path("out"), bids=bids).beside("sub-01_T1w", "report.html").as_posix() for bids in (False, True)]
        ['out/sub-01_T1w/sub-01_T1w_report.html', 'out/sub-01/sub-01_T1w_report.html']
        """
        name = safe_name(case)
        folder = f"sub-{_entities(case)[0]['sub']}" if self.bids else name
        return self.folder / folder / f"{name}_{what}"

    def _anat(self, case: str) -> Path:
        entities, suffix = _entities(case)
        parts = [f"{key}-{entities[key]}" for key in ("sub", "ses") if key in entities]
        return self.folder.joinpath(*parts, DATATYPES.get(suffix.split("+")[0], "anat"))


def choose_layout(folder: Path, wanted: LayoutName | None, *, write: bool = True, **options: Any) -> Layout:
    """Return the layout of a run, and describe the folder if it is that of BIDS.

    Args:
        folder: the output folder.
        wanted: None: as the folder is, plain if it is new.
        write: False: another process writes the description.
        options: of `Layout`, for the plain one.

    Raises:
        UsageError: the folder has results in the other layout, or belongs to another data set.
    """
    if wanted not in (None, *LAYOUTS):
        raise UsageError(f"layout={wanted!r}: give 'plain' or 'bids'")
    present = Layout.of(folder)
    if wanted == "plain" and present.bids:
        raise UsageError(f"{folder} has results in the layout bids: omit --layout plain, or choose another folder")
    if wanted != "bids":
        return present if present.bids else Layout(folder, False, **options)
    if not present.bids:
        other = _generator(folder)
        if other is not None:
            raise UsageError(
                f"{folder} is a BIDS data set of {other}: results have a folder of their own, such as "
                "derivatives/esegeta-monai in it"
            )
        if (folder / "run.json").exists() or any(folder.glob("run*.jsonl")):
            raise UsageError(f"{folder} has results in the plain layout: choose another folder for --layout bids")
    if write and not present.bids:
        ignored = "".join(f"{pattern}\n" for pattern in (*NOT_BIDS, "*_attr.*", "*_attr_*"))
        for name, text in ((".bidsignore", ignored), ("README", README)):
            if not (folder / name).exists():
                with atomic(folder / name) as temporary:
                    temporary.write_text(text, encoding="utf-8")
        maker = {"Name": GENERATOR, "Version": VERSION, "Description": "Attribution maps of a network's predictions"}
        description = {"Name": "Explanations of a network's predictions", "BIDSVersion": BIDS_VERSION}
        write_json(folder / DESCRIPTION, {**description, "DatasetType": "derivative", "GeneratedBy": [maker]})
    return Layout(folder, True)


def same_layout(folder: Path, others: list[Path]) -> None:
    """Check that output folders have one layout; a folder without results has none yet.

    Raises:
        UsageError: they have not.
    """
    started = [place for place in (folder, *others) if (place / "run.json").exists() or any(place.glob("run*.jsonl"))]
    if len({Layout.of(place).bids for place in started}) > 1:
        raise UsageError(f"{', '.join(map(str, started))}: some have the layout bids and some the plain one")


def _generator(folder: Path) -> str | None:
    """Return who made a BIDS data set, or its name; None: it is none."""
    if not (folder / DESCRIPTION).is_file():
        return None
    record = read_json(folder / DESCRIPTION) or {}
    makers = record.get("GeneratedBy")
    first = makers[0] if isinstance(makers, list) and makers else {}
    name = first.get("Name") if isinstance(first, dict) else None
    return str(name or record.get("Name") or "unknown origin")


def _entities(case: str) -> tuple[dict[str, str], str]:
    """Return the entities of a case's name, and what distinguishes it otherwise (the suffix of the scan, or "").

    The name may begin with the folders of the scan, as `esegeta_monai.utils.names.case_name` gives them.

    >>> _entities("sub-01_ses-2_run-1_T1w"), _entities("sub-01-anat-sub-01_T1w")
    (({'sub': '01', 'ses': '2', 'run': '1'}, 'T1w'), ({'sub': '01'}, 'T1w'))
    >>> _entities("patient 7")
    ({'sub': 'patient7'}, '')
    """
    match = _NAME.search(case)
    other = {"sub": _value(case, capitals=False)}, ""
    if match is None or (match.start() and f"sub-{match[2]}-" not in case[: match.start(1)]):
        return other
    parts = match[1].split("_")
    pairs = [tuple(part.split("-")) for part in parts if "-" in part]
    entities = {key: value for key, value in pairs}
    if len(entities) < len(pairs) or not set(entities) <= set(ENTITIES):
        return other
    suffix = [part for part in parts if "-" not in part]
    own = [entities.pop(key) for key in ("mod", "label", "desc") if key in entities]
    return entities, "+".join([*suffix, *own])


def _joined(entities: dict[str, str]) -> str:
    return "_".join(f"{key}-{entities[key]}" for key in ENTITIES if key in entities)


def _value(text: str, *, capitals: bool = True) -> str:
    """Convert text to the value of an entity: ASCII letters, digits and ``+``; words begin with a capital letter.

    Where letters are lost or the value is too long, it ends in eight digits of the text's checksum.

    >>> _value("MultiClassMask-grey matter"), _value("sigma0.15"), _value("größe")
    ('MultiClassMaskGreyMatter', 'sigma0p15', 'groe64de2ee3')
    """
    plain = re.sub(r"(?<=\d)\.(?=\d)", "p", unicodedata.normalize("NFKD", text))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    words = re.findall(r"[0-9a-zA-Z+]+", plain)
    lost = any(c.isalnum() and not c.isascii() for c in plain) or not words
    value = words[0] if words else ""
    value += "".join(word[:1].upper() + word[1:] if capitals else word for word in words[1:])
    if lost or len(value) > LONGEST_PART:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        value = value[: LONGEST_PART - 8] + digest
    return value
