"""The page, table and record of tests of given concepts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import esegeta_monai
from esegeta_monai.explain.tcav import ACCURACY, ConceptTest, table_rows
from esegeta_monai.output.report.render import read_text, render
from esegeta_monai.utils.csv_text import csv_text
from esegeta_monai.utils.files import atomic

__all__ = ["write_tests"]


def write_tests(output: Path, tests: Sequence[ConceptTest], alpha: float) -> Path:
    """Write ``concept_tests.html``, ``.csv`` and ``.json`` (with the concepts' vectors) into ``output``.

    Args:
        output: an existing folder.
        tests: at least one.
        alpha: level of all tests together.

    Returns:
        The page.
    """
    rows = table_rows(tests)
    blind = [t for t in tests if t.statistic == "share" and t.random_extreme > alpha]
    record = {
        "version": esegeta_monai.__version__,
        "alpha": alpha,
        "correction": "Holm over all tests",
        "least_accuracy": ACCURACY,
        "tests": [{**t.row(), "vector": t.vector.tolist()} for t in tests],
    }
    page = output / "concept_tests.html"
    content = render(
        "tested_concepts.html",
        [read_text("theme.js")],
        rows=rows,
        alpha=alpha,
        accuracy=ACCURACY,
        blind=len(blind),
        statistic=tests[0].statistic,
        random=tests[0].random_concepts,
    )
    texts = {".csv": csv_text(list(rows[0]), rows), ".json": json.dumps(record, indent=1), ".html": content}
    for suffix, text in texts.items():
        with atomic(page.with_suffix(suffix)) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    return page
