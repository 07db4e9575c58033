"""Messages about text that cannot be read name the remedy."""

from __future__ import annotations

import pytest

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import METHODS
from esegeta_monai.metrics.base import METRICS
from esegeta_monai.targets import TARGETS
from esegeta_monai.utils.mistakes import separated_by_commas


@pytest.mark.parametrize(
    ("registry", "text", "message"),
    [
        (METHODS, "Saliency GradCam", "separate several by commas: Saliency,GradCam$"),
        (METHODS, "Saliency;GradCam", "separate several by commas: Saliency,GradCam$"),
        (METHODS, "Saliency + GradCam", "separate several by commas: Saliency,GradCam$"),
        (METHODS, "GradCam(layer='m.0') LRP", r"by commas: GradCam\(layer='m.0'\),LRP$"),
        (METHODS, "Occlusion(window=64x64)", r"write 64x64 as a list: \[64, 64\]$"),
        (METHODS, "Occlusion(window=8mm)", "write 8mm without its unit: 8, "),
        (METHODS, "Occlusion(window=8", r"a bracket is missing: it has 1 \( and 0 \)$"),
        (METHODS, "GradCam(layer='a)", "a quote is not closed$"),
        (METHODS, "GradCam(layer=model.9)", "in quotes, such as layer='model.0'$"),
        (METHODS, "MultiClassMask", "MultiClassMask is a target; 'esegeta-monai methods' lists all methods$"),
        (METHODS, "Deletion", "Deletion is a metric; "),
        (TARGETS, "gradcam", "GradCam is a method; 'esegeta-monai targets' lists all targets$"),
        (METRICS, "Saliency", "Saliency is a method; "),
        (TARGETS, "MultiClassMask(class=1)", "no parameter is called 'class'.*parameters are: class_index, "),
        (TARGETS, "1", r'If 1 is a class, write "MultiClassMask\(1\)"'),
        (TARGETS, "liver", r"""lists all targets\. If liver is a class, write "MultiClassMask\('liver'\)\""""),
    ],
)
def test_the_remedy_fits_the_mistake(registry, text, message):
    with pytest.raises(UsageError, match=message):
        registry.create_all(text)


@pytest.mark.parametrize("text", ["Saliency", "grey matter?", "Occlusion(window=(8, 8))", "3 4", ""])
def test_what_is_no_list_of_names_stays(text):
    assert separated_by_commas(text) is None


def test_a_number_in_quotes_or_a_name_has_no_unit():
    with pytest.raises(UsageError, match="write Name or Name"):
        METHODS.create("GradCam(layer='conv 3d' layer2)")
