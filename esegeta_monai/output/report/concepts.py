"""The gallery page of ``esegeta-monai concepts``, with a picture for each region and a table of all shares."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.data import MetaTensor

from esegeta_monai.explain.concepts import CaseConcepts, Region
from esegeta_monai.files.pictures.picture import save_picture
from esegeta_monai.methods.relevance.concepts import MOST
from esegeta_monai.output.report.render import read_text, render
from esegeta_monai.utils.csv_text import csv_text
from esegeta_monai.utils.files import atomic
from esegeta_monai.utils.names import safe_name

__all__ = ["ChannelEntry", "RegionEntry", "region_entry", "write_gallery"]


@dataclass(frozen=True)
class RegionEntry:
    """A region in the gallery: its case, the channel's share there, edges in mm as text, picture as a data URL."""

    case: str
    share: float
    size: str
    picture: str
    through: float | None


@dataclass(frozen=True)
class ChannelEntry:
    """A channel in the gallery: target, layer, number, mean share over ``cases`` scans, and its regions."""

    target: str
    layer: str
    channel: int
    share: float
    cases: int
    regions: Sequence[RegionEntry]

    @property
    def warning(self) -> str | None:
        """That most relevance flows around the layer, in the median of the regions; None: it does not."""
        shares = sorted(r.through for r in self.regions if r.through is not None)
        if not shares or shares[len(shares) // 2] >= MOST:
            return None
        share = 100 * shares[len(shares) // 2]
        return f"Only {share:.2g} % of the target's relevance passes this layer; the rest flows around it."


def region_entry(region: Region, image: MetaTensor, output: Path) -> RegionEntry:
    """Draw the cut-out of a region as a PNG in ``output``, and describe it.

    Args:
        region: a region of ``image``.
        image: (1, C, *spatial).
        output: folder of the page.
    """
    box, concepts = region.box, region.concepts
    affine = torch.as_tensor(image.affine).double().reshape(-1, *image.affine.shape[-2:])[0].clone()
    axes = len(box)
    start = torch.tensor([float(b.start) for b in box], dtype=affine.dtype)
    affine[:axes, -1] += affine[:axes, :axes] @ start
    cut = (slice(None), *box)
    scan = MetaTensor(image.as_tensor()[0].cpu()[cut], affine=affine)
    name = f"{safe_name(concepts.target)}_channel{region.channel}_{safe_name(concepts.case)}.png"
    save_picture(
        output / name,
        scan,
        region.map[cut],
        signed=True,
        case=concepts.case,
        method=f"channel {region.channel} of {concepts.layer}",
        target=concepts.target,
        units="relevance",
    )
    picture = "data:image/png;base64," + base64.b64encode((output / name).read_bytes()).decode()
    size = " x ".join(f"{edge:.3g}" for edge in region.size)
    through = region.record.get("share_through_layer")
    return RegionEntry(concepts.case, float(concepts.share[region.channel]), size, picture, through)


def write_gallery(output: Path, channels: Sequence[ChannelEntry], cases: Sequence[CaseConcepts]) -> Path:
    """Write ``concepts.html`` and ``concepts.csv`` into ``output``; return the page.

    Args:
        output: an existing folder.
        channels: the channels to show, in order.
        cases: of the table: one row per case, target and channel.
    """
    rows = [
        {"case": c.case, "target": c.target, "layer": c.layer, "channel": k, "relevance": float(r), "share": float(s)}
        for c in cases
        for k, (r, s) in enumerate(zip(c.relevance, c.share))
    ]
    page = output / "concepts.html"
    content = render("concepts.html", [read_text("theme.js")], channels=channels)
    for path, text in ((output / "concepts.csv", csv_text(list(rows[0]), rows)), (page, content)):
        with atomic(path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    return page
