"""The gallery of concepts that were found, with a picture for each part that shows one, and a table."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.data import MetaTensor

import esegeta_monai
from esegeta_monai.explain.concept_discovery import SAME, CaseUnits, FoundConcept
from esegeta_monai.files.pictures.picture import save_picture
from esegeta_monai.output.report.render import read_text, render
from esegeta_monai.utils.csv_text import csv_text
from esegeta_monai.utils.files import atomic
from esegeta_monai.utils.names import safe_name

__all__ = ["FoundEntry", "PartEntry", "part_entry", "write_found"]


@dataclass(frozen=True)
class PartEntry:
    """The part of a case in which a concept is strongest: case, strength there, picture as a data URL."""

    case: str
    strength: float
    picture: str


@dataclass(frozen=True)
class FoundEntry:
    """A concept in the gallery, its layer, and the parts that show it."""

    concept: FoundConcept
    layer: str
    parts: Sequence[PartEntry]


def part_entry(concept: FoundConcept, unit: CaseUnits, image: MetaTensor, output: Path) -> PartEntry:
    """Draw the strength of a concept in all parts, at the strongest one, as a PNG in ``output``.

    Args:
        concept: of `find_concepts`.
        unit: of the case.
        image: (1, C, *spatial).
        output: folder of the page.
    """
    strength = torch.from_numpy(concept.strength[unit.case])
    painted = torch.cat([strength.new_zeros(1), strength])[unit.labels + 1]
    strongest = int(strength.argmax())
    scan = MetaTensor(
        image.as_tensor()[0].cpu(), affine=torch.as_tensor(image.affine).reshape(-1, *image.affine.shape[-2:])[0]
    )
    name = f"concept{concept.number}_{safe_name(unit.case)}.png"
    save_picture(
        output / name,
        scan,
        painted[None],
        signed=False,
        case=unit.case,
        method=f"concept {concept.number}",
        target=unit.layer,
        units="strength",
    )
    picture = "data:image/png;base64," + base64.b64encode((output / name).read_bytes()).decode()
    return PartEntry(unit.case, float(strength[strongest]), picture)


def write_found(output: Path, finder: str, entries: Sequence[FoundEntry]) -> Path:
    """Write ``found_concepts.html``, ``.csv`` and ``.json`` (with directions) into ``output``; return the page.

    Args:
        output: an existing folder.
        finder: ``"ACE"`` or ``"CRAFT"``.
        entries: at least one concept.
    """
    rows = [
        {**e.concept.row(), "target": t, "score": e.concept.score[t], "mean": e.concept.mean[t], "layer": e.layer}
        for e in entries
        for t in e.concept.score
    ] or [{**e.concept.row(), "layer": e.layer} for e in entries]
    record = {
        "version": esegeta_monai.__version__,
        "finder": finder,
        "layer": entries[0].layer,
        "least_cosine": SAME,
        "concepts": [
            {
                **e.concept.row(),
                "direction": e.concept.direction.tolist(),
                "score": e.concept.score,
                "mean": e.concept.mean,
            }
            for e in entries
        ],
    }
    page = output / "found_concepts.html"
    content = render("found_concepts.html", [read_text("theme.js")], entries=entries, finder=finder, same=SAME)
    texts = {".csv": csv_text(list(rows[0]), rows), ".json": json.dumps(record, indent=1), ".html": content}
    for suffix, text in texts.items():
        with atomic(page.with_suffix(suffix)) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    return page
