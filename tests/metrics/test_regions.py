"""Region tables by hand."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai.metrics.base import MetricInput
from esegeta_monai.metrics.regions import region_table


def table(**more):
    """A 4 x 6 map of two channels, 2 x 3 mm voxels; the body is the left half."""
    values = torch.arange(48, dtype=torch.float64).reshape(2, 4, 6) - 20
    body = torch.zeros(4, 6, dtype=torch.bool)
    body[:, :3] = True
    label = torch.zeros(4, 6, dtype=torch.bool)
    label[1, 1] = True
    subject = MetricInput(values, body=body, label=label, spacing=(2.0, 3.0))
    return values, body, {row["region"]: row for row in region_table(subject, **more)}


def test_sums_by_hand():
    regions = torch.zeros(4, 6, dtype=torch.long)
    regions[0], regions[2] = 1, 7
    values, body, rows = table(regions=regions, names={1: "liver"}, channel_names=["T1", "T2"])
    total = float(values.abs().sum())
    assert rows["all"] | {} == {
        "region": "all",
        "voxels": 24,
        "volume_mm3": 24 * 6.0,
        "sum": float(values.sum()),
        "abs_sum": total,
        "share_of_abs": 1.0,
        "mean": float(values.mean()),
        "alarm": None,
    }
    assert rows["liver"]["sum"] == float(values[:, 0].sum())
    assert rows["liver"]["voxels"] == 6
    assert rows["label 7"]["abs_sum"] == float(values[:, 2].abs().sum())
    assert rows["channel T2"]["share_of_abs"] == pytest.approx(float(values[1].abs().sum()) / total)
    assert rows["body"]["sum"] + rows["outside the body"]["sum"] == rows["all"]["sum"]
    assert rows["body"]["mean"] == pytest.approx(float(values[:, body].mean()))


def test_distance_shells_hold_all_voxels_once():
    """Voxel (1, 1) is the origin: its neighbours lie 2, 3 and sqrt(13) mm away."""
    values, body, rows = table()
    shells = {name: row for name, row in rows.items() if name.startswith("distance")}
    assert shells["distance inside"]["voxels"] == 1
    assert shells["distance inside"]["sum"] == float(values[:, 1, 1].sum())
    inside_body = sum(row["voxels"] for row in shells.values())
    assert inside_body == int(body.sum())
    within = [(i, j) for i in range(4) for j in range(3) if 0 < (4 * (i - 1) ** 2 + 9 * (j - 1) ** 2) ** 0.5 <= 5]
    assert shells["distance 0-5 mm"]["sum"] == sum(float(values[:, i, j].sum()) for i, j in within)


@pytest.mark.parametrize(("alarm", "raised"), [(0.1, True), (0.9, False)])
def test_the_alarm_is_raised_above_the_stated_share(alarm, raised):
    values, body, rows = table(alarm=alarm)
    share = float(values[:, ~body].abs().sum() / values.abs().sum())
    assert 0.1 < share < 0.9
    result = rows["outside the body"]["alarm"]
    assert (result is not None) == raised
    assert not raised or f"{100 * share:.0f} %" in result


def test_a_zero_map_has_no_shares():
    subject = MetricInput(torch.zeros(1, 4, 6), body=torch.ones(4, 6, dtype=torch.bool))
    assert [row["share_of_abs"] for row in region_table(subject)] == [None, None, None]
