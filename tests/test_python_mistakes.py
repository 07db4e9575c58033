"""Natural mistakes in Python: an error of this package that names the cause and the way out."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esegeta_monai import Explainer
from esegeta_monai.bundle import BundleReader
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.handlers import ExplanationHandler
from tests.support.cli import make_bundle

NETWORK = torch.nn.Conv3d(1, 2, 3, padding=1)
IMAGE = torch.rand(1, 1, 8, 8, 8)


def explain(image: Any = IMAGE, targets: Any = "MultiClassMask(1)", **options: Any) -> Any:
    return Explainer(NETWORK, **options)(image, ["Saliency"], [targets])[0]


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        (lambda: explain(inferer=(96, 96, 96)), UsageError, "such as SlidingWindowInferer((96, 96, 96), sw_batch"),
        (lambda: explain(device="gpu"), UsageError, "device='gpu': no such device; write 'cpu', 'cuda' or 'cuda:1'"),
        (lambda: explain(volume_device="gpu"), UsageError, "volume_device='gpu': no such device"),
        (lambda: explain(class_names=["background", "liver"]), UsageError, "the name of each number, such as {1:"),
        (lambda: explain(IMAGE.numpy()), InputError, "got ndarray: convert it, torch.from_numpy(image)"),
        (lambda: explain("scan.nii.gz"), InputError, "got str: read the file first"),
        (lambda: explain(targets=1), UsageError, 'If 1 is a class, write "MultiClassMask(1)"'),
        (lambda: ExplanationHandler(output_dir="out").attach(NETWORK), UsageError, "Conv3d is no engine; give a MONAI"),
    ],
)
def test_the_error_says_what_to_give(mistake: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        mistake()


def test_a_device_of_a_reader_that_does_not_exist(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="device='gpu': no such device"):
        BundleReader(make_bundle(tmp_path / "bundle"), device="gpu")
