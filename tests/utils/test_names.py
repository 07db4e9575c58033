from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.errors import UsageError
from esegeta_monai.targets import MultiClassMask
from esegeta_monai.utils.names import case_name, check_clashes, distinct_names, map_path, one_line, safe_name

HOSTILE = [
    *("../../etc/passwd", "..", ".", "/", "\\\\server\\share", "a/b", "a\\b", "~root", "-rf", ".hidden", "", "   "),
    *("<img onerror=alert(1)>", "a\nb", "a\x00b", "a\u202eb", "con", "NUL.txt", "COM1", "a:b", "a*b?", "x" * 5000),
    *("größe", "病例一", "é" * 300, "😀" * 40, "\udcff", "e\u0301", "a..b", "{case}", "%s", "$(rm)", "a'b\"c"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_become_plain_files_in_the_folder(name: str, tmp_path: Path) -> None:
    path = map_path(tmp_path, name, name, name)
    assert path.resolve().parent.parent == tmp_path.resolve()
    assert not path.name.startswith((".", "-"))
    assert not set(path.name) & set("<>:\"/\\|?*\n\x00\u202e$'{}%~ ")
    assert len(f".tmp-12345678-{path.name}".encode()) <= 255
    path.parent.mkdir()
    path.write_bytes(b"")
    assert path.parent.name.split(".")[0].upper() not in {"CON", "NUL", "COM1"}


def test_no_case_is_called_like_a_file_of_the_output_folder() -> None:
    for name in ("run.json", "RUN.JSONL", "run.part0.jsonl", "run.json.unreadable", "index.html", "metrics.csv"):
        assert safe_name(name) == f"_{name}"
    for name in ("run", "run.json.gz", "runner.json", "index", "my-metrics.csv"):
        assert safe_name(name) == name


def test_readable_names_stay_as_they_are() -> None:
    for name in ("sub-01_ses-2_T1w", "2024_01_15", "007", "1e5", "MultiClassMask-class_index1", "a.b"):
        assert safe_name(name) == name
    kept = sys.getfilesystemencoding() == "utf-8"  # else the locale's file names cannot hold the letters
    assert safe_name("größe") == ("größe" if kept else "gr-e")
    assert isinstance(safe_name("2024_01_15"), str)


def test_composed_and_decomposed_letters_are_one_name() -> None:
    assert safe_name("e\u0301") == safe_name("\u00e9")


def test_long_names_that_differ_at_the_end_stay_apart() -> None:
    one, two = safe_name("x" * 200 + "1"), safe_name("x" * 200 + "2")
    assert one != two
    assert len(one.encode()) == len(two.encode()) == 60
    assert len(safe_name("病" * 100).encode()) <= 60


def test_map_path_layouts() -> None:
    assert map_path("o", "c", "t", "M").as_posix() == "o/c/c_t_M_attr.nii.gz"
    assert map_path("o", "c", "t", "M", "", separate_folder=False, extension=".nii").as_posix() == "o/c_t_M.nii"
    with pytest.raises(UsageError, match="maps are written as one of"):
        map_path("o", "c", "t", "M", extension=".png")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/d/a.nii.gz", "a"),
        ("/d/a.NII.GZ", "a"),
        ("/d/a.nii", "a"),
        ("a.b.nrrd", "a.b"),
        ("a.mha", "a"),
        ("a.mhd", "a"),
        ("a.dcm", "a"),
        ("a.png", "a"),
        ("2024_01_15.nii.gz", "2024_01_15"),
        ("007.nii", "007"),
        ("1.2.840.113619", "1.2.840.113619"),
        ("/d/series/", "series"),
        ("a.nii.nii.gz", "a.nii"),
    ],
)
def test_case_name(path: str, name: str) -> None:
    assert case_name(path) == name


def test_a_dicom_folder_keeps_its_whole_name_and_roots_distinguish(tmp_path: Path) -> None:
    (tmp_path / "p1" / "scan.nii").mkdir(parents=True)
    assert case_name(tmp_path / "p1" / "scan.nii") == "scan.nii"
    assert case_name(tmp_path / "p1" / "T1.nii.gz", tmp_path) == "p1-T1"
    assert case_name(tmp_path / "T1.nii.gz", tmp_path) == "T1"
    assert case_name("/elsewhere/T1.nii.gz", tmp_path) == "T1"


def test_clashes_are_refused_before_any_work() -> None:
    check_clashes(["a", "b"], ["t", "u"], ["M", "N"])
    check_clashes([], [], [])
    for cases in (["a", "a"], ["a b", "a-b"], ["a/b", "a:b"], ["", "unnamed"], ["Case", "case"]):
        with pytest.raises(UsageError, match=r"case .* and case .* overwrite each other"):
            check_clashes(cases, ["t"], ["M"])
    with pytest.raises(UsageError, match="target 'grey matter' and target 'grey-matter'"):
        check_clashes(["a"], ["grey matter", "grey-matter"], ["M"])
    with pytest.raises(UsageError, match="method 'M' and method 'M'"):
        check_clashes(["a"], ["t"], ["M", "M"])


def test_combinations_that_meet_are_refused() -> None:
    for cases in ([], ["a"], ["a", "b"]):
        with pytest.raises(UsageError, match=r"^target 'x_y' and method 'M' and target 'x' and method 'y_M' would"):
            check_clashes(cases, ["x_y", "x"], ["M", "y_M"])
    check_clashes(["a", "a_t"], ["t_t", "t"], ["M"])  # folders keep them apart
    with pytest.raises(UsageError, match="case 'a' with target 't_t'"):
        check_clashes(["a", "a_t"], ["t_t", "t"], ["M"], separate_folder=False)


@dataclass
class Thing:
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


class Occlusion(Thing):
    pass


class SmoothGrad(Thing):
    pass


def occlusion(name: str = "Occlusion", **parameters: Any) -> Occlusion:
    return Occlusion(name, parameters)


def test_one_of_a_kind_keeps_its_name() -> None:
    assert distinct_names([occlusion(window=8), SmoothGrad("SmoothGrad")]) == ["Occlusion", "SmoothGrad"]
    assert distinct_names([]) == []


def test_two_of_a_kind_get_only_what_distinguishes_them() -> None:
    pair = [occlusion(stride=4, window=8, value=0.0), occlusion(stride=4, window=16, value=1.0)]
    assert distinct_names(pair) == ["Occlusion-window8", "Occlusion-window16"]
    three = [occlusion(window=(8, 8), value=v) for v in (0.0, 0.1)] + [occlusion(window=(4, 8), value=0.0)]
    assert distinct_names(three) == [
        "Occlusion-window8x8-value0.0",
        "Occlusion-window8x8-value0.1",
        "Occlusion-window4x8-value0.0",
    ]


def test_wrappers_are_distinguished_by_what_they_wrap() -> None:
    def wrapper(inner: dict[str, Any]) -> SmoothGrad:
        return SmoothGrad("SmoothGrad", {"method": inner, "n_samples": 4})

    assert distinct_names([wrapper({"name": "Saliency"}), wrapper({"name": "IntegratedGradients"})]) == [
        "SmoothGrad-methodSaliency",
        "SmoothGrad-methodIntegratedGradients",
    ]
    assert distinct_names([wrapper({"name": "IG", "n_steps": n}) for n in (32, 64)]) == [
        "SmoothGrad-n_steps32",
        "SmoothGrad-n_steps64",
    ]


def test_a_given_name_wins() -> None:
    assert distinct_names([occlusion("coarse", window=16), occlusion(window=8)]) == ["coarse", "Occlusion"]
    assert distinct_names([occlusion("a", window=8), occlusion("b", window=8)]) == ["a", "b"]


def test_the_package_s_own_targets() -> None:
    one, two = MultiClassMask(1), MultiClassMask(2)
    assert distinct_names([one]) == ["MultiClassMask"]
    assert distinct_names([one, two]) == ["MultiClassMask-class_index1", "MultiClassMask-class_index2"]
    assert distinct_names([MultiClassMask(1, name="MultiClassMask"), MultiClassMask(2, name="grey")]) == [
        "MultiClassMask",
        "grey",
    ]


@pytest.mark.parametrize(
    "twins",
    [
        [occlusion(window=8), occlusion(window=8)],
        [occlusion("same", window=8), occlusion("same", window=16)],
        [occlusion("a b"), occlusion("a-b")],
        [occlusion("Coarse"), occlusion("coarse")],
        [occlusion("Occlusion-window8"), occlusion(window=8), occlusion(window=16)],
    ],
)
def test_a_real_clash_is_a_usage_error(twins: list[Thing]) -> None:
    with pytest.raises(UsageError, match="give one of them another name="):
        distinct_names(twins)


@pytest.mark.parametrize(("undecoded", "text"), [(b"gr\xc3\xb6\xc3\x9fe", "größe"), (b"gr\xf6\xdfe", r"gr\xf6\xdfe")])
def test_bytes_that_the_locale_could_not_decode_become_text(undecoded: bytes, text: str) -> None:
    assert one_line(undecoded.decode("ascii", "surrogateescape")) == text
    assert one_line("a\ud800b") == "a?b"
