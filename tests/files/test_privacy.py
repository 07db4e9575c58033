"""No folder and no name of a scan leaves in a text."""

from __future__ import annotations

import pytest

from esegeta_monai.files.privacy import private, traceback_text, without_paths


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/Doe Jane/t1.nii.gz: the file is empty", "(scan): the file is empty"),
        ("/data/Doe, Jane/t1.nii.gz: the file is empty", "(scan): the file is empty"),
        ("reading '/data/Doe, Jane/t 1.MHA' failed", "reading '(scan)' failed"),
        ("cannot open /data/Doe, Jane/t 1.nii.gz: no space", "cannot open (scan): no space"),
        (
            "Doe_t1.nii.gz is not on the grid of Doe_t2.nii.gz: register",
            "(scan) is not on the grid of (scan): register",
        ),
        ("see Doe a.nii.gz, /d/Doe b.nii.gz and c/Doe.nrrd", "(scan), (scan) and (scan)"),
        (
            "Occlusion: baseline file /data/x/mean.nii.gz does not exist",
            "Occlusion: baseline file mean.nii.gz does not exist",
        ),
        (
            "feature map: 'Doe 1.nii.gz' is neither a file nor a key",
            "feature map: '(scan)' is neither a file nor a key",
        ),
        (r"C:\Users\doe\x.txt is missing", "x.txt is missing"),
        ("cannot write ../Doe/out: no space", "cannot write out: no space"),
        ("[Errno 2] No such file: '/data/Jane Doe/x y.txt'", "[Errno 2] No such file: 'x y.txt'"),
        ("patients/doe/notes.txt", "notes.txt"),
        ("doi:10.1371/journal.pone.0130140, 3/4 of logit/voxel, https://example.org/a", None),
        ("an image of 3 x 4 voxels, a/b", None),
    ],
)
def test_paths_become_their_last_part_and_scans_vanish(text: str, expected: str | None) -> None:
    assert without_paths(text) == (text if expected is None else expected)


def test_nested_values() -> None:
    value = {"mask": "/d/doe/label.nii.gz", "list": [1, None, "~/doe/a.txt"], "deep": {"/x/k": 2.5}}
    assert private(value) == {"mask": "(scan)", "list": [1, None, "a.txt"], "deep": {"k": 2.5}}


def test_a_traceback_has_code_and_causes_but_no_folder() -> None:
    def opens() -> None:
        raise OSError("no /home/doe/Jane.nii.gz")

    try:
        try:
            opens()
        except OSError as error:
            raise ValueError("cannot go on") from error
    except ValueError as error:
        text = traceback_text(error)
    assert "test_privacy.py, line" in text
    assert "/" not in text.replace("tests/", "")
    lines = text.splitlines()
    assert lines[-1] == "ValueError: cannot go on"
    assert lines.index("which led to:") > lines.index("OSError: no (scan)")
