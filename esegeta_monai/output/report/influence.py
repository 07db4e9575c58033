"""The page, table and record of the influence of training cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esegeta_monai.explain.influence import Influence
from esegeta_monai.output.report.render import read_text, render
from esegeta_monai.utils.csv_text import csv_text
from esegeta_monai.utils.files import atomic

__all__ = ["ShownCase", "ShownTarget", "shown_cases", "write_influence"]


@dataclass(frozen=True)
class ShownCase:
    """A training case on the page: name, score, self-influence, loss, picture as a data URI."""

    name: str
    score: float
    self_influence: float
    loss: float
    picture: str


@dataclass(frozen=True)
class ShownTarget:
    """An explained case and target on the page, with its picture and the most helpful and most harmful cases."""

    case: str
    target: str
    picture: str
    helpful: Sequence[ShownCase]
    harmful: Sequence[ShownCase]


def shown_cases(influence: Influence, count: int) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
    """Choose what the page shows.

    Args:
        influence: the scores.
        count: most cases of a list.

    Returns:
        For each explained target the columns with the largest positive and the lowest negative scores; and the columns
        of the largest self-influence.
    """
    lists = []
    for row in range(len(influence.explained)):
        order, scores = influence.ranked(row), influence.scores[row]
        helpful = [n for n in order if scores[n] > 0][:count]
        harmful = [n for n in reversed(order) if scores[n] < 0][:count]
        lists.append((helpful, harmful))
    return lists, np.argsort(-influence.self_influence, kind="stable")[:count].tolist()


def write_influence(
    output: Path, influence: Influence, targets: Sequence[ShownTarget], own: Sequence[ShownCase]
) -> Path:
    """Write ``influence.html``, ``.csv`` (one row for each target and training case) and ``.json`` into ``output``.

    Args:
        output: an existing folder.
        influence: the scores.
        targets: what the page shows.
        own: the cases of the largest self-influence.

    Returns:
        The page.
    """
    rows = influence.rows()
    page = output / "influence.html"
    content = render("influence.html", [read_text("theme.js")], targets=targets, own=own, record=influence.record)
    texts = {".csv": csv_text(list(rows[0]), rows), ".json": json.dumps(influence.record, indent=1), ".html": content}
    for suffix, text in texts.items():
        with atomic(page.with_suffix(suffix)) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    return page
