"""Names of channels and classes from a bundle's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.bundle import BundleReader
from esegeta_monai.bundle.metadata import BundleMetadata
from tests.bundle.support import minimal
from tests.support.synthetic import write

pytestmark = pytest.mark.usefixtures("no_scripts_from_elsewhere")


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (
            {"image": {"num_channels": 4, "channel_def": {"0": "T1c", "1": "T1", "2": "T2", "3": "FLAIR"}}},
            {0: "T1c", 1: "T1", 2: "T2", 3: "FLAIR"},
        ),
        ({"image": {"num_channels": 3, "channel_def": {"0": "image"}}}, {0: "image 0", 1: "image 1", 2: "image 2"}),
        ({"image": {"num_channels": 2}}, {0: "channel 0", 1: "channel 1"}),
        ({"scan": {"channel_def": ["R", "G"]}}, {0: "R", 1: "G"}),
        ({}, {}),
        (None, {}),
    ],
)
def test_channel_names(tmp_path: Path, inputs: Any, names: dict[int, str]) -> None:
    metadata = {"network_data_format": {"inputs": inputs}}
    assert BundleReader(write(tmp_path / "bundle", minimal(), metadata=metadata)).channel_names == names


def test_class_names_of_several_heads(tmp_path: Path) -> None:
    outputs = {"distance": {}, "nuclei": {"channel_def": {"0": "other", "1": "Back Ground", "x": "?"}}}
    metadata = {"network_data_format": {"outputs": outputs}}
    reader = BundleReader(write(tmp_path / "bundle", minimal(), metadata=metadata))
    assert reader.class_names == {0: "other", 1: "Back Ground"}
    assert reader.background == 1


@pytest.mark.parametrize(
    ("outputs", "declared"),
    [
        ({"pred": {"type": "image", "format": "segmentation"}}, None),
        ({"pred": {"type": "probabilities", "format": "classes"}}, "probabilities"),
        ({"pred": {"type": "tuples"}}, "regression"),
        ({"age": {"format": "regression"}}, "regression"),
        ({"a": {"type": "logits"}, "b": {"type": "tuples"}}, None),
        ({"pred": "text"}, None),
        ({}, None),
    ],
)
def test_the_meaning_that_the_metadata_declare(outputs, declared):
    assert BundleMetadata({"network_data_format": {"outputs": outputs}}).declared == declared
