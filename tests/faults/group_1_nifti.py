"""Malformed NIfTI files."""

from __future__ import annotations

from pathlib import Path

from tests.faults.runner import TARGET, Row, command, statuses, unfinished
from tests.support.cli import make_bundle, make_scan

GROUP = "1 malformed NIfTI files, labels and regions"


def _empty(folder: Path) -> str | None:
    (folder / "bad.nii.gz").write_bytes(b"")
    done = command(
        *("explain", "--bundle", make_bundle(folder / "bundle"), "--methods", "Saliency", "--target", TARGET),
        *("--input", folder / "bad.nii.gz", make_scan(folder / "good.nii.gz"), "--output", folder / "out"),
    )
    assert done.code == 1, done.err
    assert set(statuses(folder / "out").values()) == {"failed", "ok"}
    assert not unfinished(folder / "out")
    return f"{done.seconds:.1f} s"


ROWS = [Row(GROUP, "empty file", _empty)]
