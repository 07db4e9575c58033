from __future__ import annotations

import pytest
import torch

from benchmarks.amp import Row, rows, table
from esegeta_monai.methods import METHODS
from tests.support.networks import ELSEWHERE


@pytest.mark.slow
def test_every_method_under_autocast_keeps_float32s_map() -> None:
    result = list(rows("UNet_batch:2", "cpu", torch.bfloat16, seed=1))
    assert {"Captum" if r.method.startswith("Captum") else r.method for r in result} == {
        m.__name__ for m in METHODS
    } - {
        "Cam",
        *ELSEWHERE,
    }  # a linear head, attention, prompts
    measured = [r for r in result if not r.alone]
    assert [r for r in measured if r.missed] == []
    assert all((r.first is not None) or r.fallback for r in measured)
    assert any(r.fallback is None for r in measured)
    assert all(r.saved == pytest.approx(1, abs=1e-6) for r in result if r.alone or r.fallback)


def test_the_table_counts_fallbacks_and_misses() -> None:
    result = [
        Row("A:2", "Good", 0.999, 0.998, 0.998, None),
        Row("A:2", "Spared", 0.98, 0.995, 1.0, "correlation 0.9800"),
        Row("A:2", "Missed", 0.999, 0.97, 0.97, None),
        Row("A:2", "Rule", None, None, 1.0, None, alone=True),
    ]
    text = "\n".join(table(result, ["A:2"], "here"))
    assert "3 pairs of method and network were measured; 1 fell back to float32, 1 of them although" in text
    assert "Of the 2 maps computed under autocast 1 correlate below 0.99" in text
    assert "* Missed on A:2: first window 0.9990, whole map 0.9700" in text
    assert "| Rule | – | – | 1.0000 | always float32 |" in text
