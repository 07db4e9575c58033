"""Classes are found by number or name."""

from __future__ import annotations

import pytest

from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import resolve_class

NAMES = {0: "background", 1: "White Matter", 2: "lesion"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1, 1), ("1", 1), ("white-matter", 1), ("WHITE_MATTER", 1), ("lesion", 2), (3, 3)],
)
def test_classes_by_number_or_name(given, expected):
    assert resolve_class(given, 4, NAMES) == (expected, NAMES.get(expected, f"class{expected}"))


@pytest.mark.parametrize("bad", [-1, 4, "4", "-1", "grey", True])
def test_a_class_that_is_not_there_lists_those_that_are(bad):
    with pytest.raises(TargetError, match=r"1 \(White Matter\)"):
        resolve_class(bad, 4, NAMES)


def test_a_misspelled_class_is_guessed():
    names = {i: f"organ {i}" for i in range(100)} | {77: "left kidney"}
    with pytest.raises(TargetError, match="did you mean 'left kidney'"):
        resolve_class("left kidny", 100, names)


def test_a_name_beyond_the_outputs_is_no_class():
    with pytest.raises(TargetError):
        resolve_class("lesion", 2, NAMES)
