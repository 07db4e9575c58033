"""The part of the compatibility table that every test run measures: each row in 2D and in 3D, each network in 2D and in
3D, each rule; the whole table is ``python -m tests.compatibility``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from esegeta_monai.engine.rules import COMPOSITES, RULES, composite_of
from tests.compatibility.checks import ATTENTION, EXCEPTIONS, ROWS, Figure, NotApplicable, Row, measure, ours
from tests.compatibility.sight import Sight
from tests.networks import NAMES

# Methods that integrate or mask channel by channel take hundreds of passes: about a second on these.
SMALL = ["MeshNet", "TwoHeads", "TupleNet", "SoftmaxInside", "ViTAutoEnc", "ViT"]
LONG = {"IntegratedGradients", "BlurIG", "GuidedIG", "LayerConductance"}
# Rows that apply to few networks: one for 2D, one for 3D.
PLACES = {
    "Cam": ("SEResNet50", "EfficientNet"),
    "AttentionRollout": ("UNETR", "SwinUNETR"),
    "AttentionRelevance": ("SwinUNETR", "ViT"),
    "LeGrad": ("ViTAutoEnc", "UNETR"),
    "PatternNet": ("SegResNet", "ResNet50"),
    "PatternAttribution": ("DenseNet121", "UNet_instance"),
}


def covering() -> list[tuple[Row, str, int]]:
    """Return the rows in order, each with the next network that it applies to."""
    cells = []
    for dims in (2, 3):
        turn = 7 * dims
        for i, row in enumerate(ROWS):
            if row.name in LONG:
                network = SMALL[(i + dims) % len(SMALL)]
            elif row.name in PLACES:
                network = PLACES[row.name][dims - 2]
            else:
                while (row.name, NAMES[turn % len(NAMES)]) in EXCEPTIONS:
                    turn += 1
                network, turn = NAMES[turn % len(NAMES)], turn + 1
            cells.append((row, network, dims))
    return cells


CELLS = covering()


@pytest.mark.parametrize(
    ("row", "network", "dims"), [pytest.param(*c, id=f"{c[0].name}-{c[1]}-{c[2]}D".replace(" ", "-")) for c in CELLS]
)
def test_cell(row: Row, network: str, dims: int) -> None:
    figure = measure(row, Sight(network, dims))
    assert figure.green, f"{figure.value:.2e} > {figure.tolerance:.0e} {figure.note}"


def test_everything_is_covered() -> None:
    for dims in (2, 3):
        assert {r.name for r, _, d in CELLS if d == dims} == {r.name for r in ROWS}
        assert {n for _, n, d in CELLS if d == dims} == set(NAMES)
    used = [composite_of(c, low=0.0, high=1.0) for c in COMPOSITES]
    rules = {type(rule).__name__ for c in used for rule in (c.convolution, c.dense, c.first) if rule is not None}
    assert rules == set(RULES)
    assert {r.name for r in ROWS} >= {f"LRP {c}" for c in COMPOSITES}


def test_a_check_can_fail() -> None:
    """Half of the right map, and the map of another method, are red under every row that compares or adds up."""
    plain, attending = Sight("TwoHeads", 2), Sight("ViT", 2)
    for row in ROWS:
        sight = attending if row.section == ATTENTION else plain
        if row.name in {*LONG, "Cam"} or row.neuron:
            continue

        def halved(sight: Sight, row: Row = row, **parameters: object) -> object:
            answer = ours(row)(sight, **parameters)
            return replace(answer, map=answer.map / 2, notes={k: v for k, v in answer.notes.items() if k != "booked"})

        figure = row.check(sight, halved)  # type: ignore[arg-type]
        assert isinstance(figure, Figure)
        assert not figure.green, row.name


def test_a_place_that_a_method_does_not_have_is_a_sentence() -> None:
    for row, network, reason in (
        ("Cam", "UNet_batch", "pooled"),
        ("PatternNet", "AttentionUnet", r"'mul' in AttentionBlock \(model.*no linear neuron"),
    ):
        with pytest.raises(NotApplicable, match=reason):
            measure(next(r for r in ROWS if r.name == row), Sight(network, 2))


def test_patterns_of_fewer_cases_are_not_the_same() -> None:
    sight = Sight("TwoHeads", 2)
    row = next(r for r in ROWS if r.name == "PatternNet")
    assert not row.check(sight, lambda s, **p: ours(row)(s, **p, cases=s.cases[:1])).green


def test_the_known_exceptions_are_still_exceptions() -> None:
    """An entry that no longer holds must go."""
    torch.set_num_threads(1)
    seen = set()
    for row, network in EXCEPTIONS:
        if row not in seen:
            seen.add(row)
            assert not measure(next(r for r in ROWS if r.name == row), Sight(network, 2)).green
