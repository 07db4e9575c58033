"""PatternNet and PatternAttribution through windows, their file, and the command that fits them."""

from __future__ import annotations

import nibabel as nib
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.engine.rules import back_project
from esegeta_monai.errors import MethodError, RuleError, UsageError
from esegeta_monai.methods import PatternAttribution, PatternNet
from esegeta_monai.methods.relevance.patterns import FittedPatterns
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import setting
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close

METHODS = [PatternNet, PatternAttribution]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "dims"),
    [(n, 2) for n in ("UNet_batch", "UNet_instance", "SegResNet")]
    + [pytest.param("SegResNet", 3, marks=pytest.mark.slow)],
)
def test_windows_are_added(name, dims, method):
    """Three overlapping gaussian windows: as each alone, added by hand."""
    s = setting(name, dims, MultiClassMask(1))
    cases = [s.image.flip(-1), 0.5 * s.image + 0.1]
    actual = method(cases=cases)
    result = explain(actual, s.objective)
    patterns = FittedPatterns.fit(s.objective.derive(image=case) for case in cases).patterns
    total = torch.zeros_like(s.image)
    cotangents = torch.stack(s.objective.cotangents(s.objective.windows))
    for j, w in enumerate(s.objective.windows):
        window = s.objective.plan.cut(s.image, w)[None]
        part = back_project(
            lambda z: s.model(z)[:, s.objective.channels], window, cotangents[:, j : j + 1], patterns, actual.way
        )
        total[(slice(None), *s.objective.plan.slices[w])] += part[0, 0]
    close(result.maps[0], total)
    assert result.notes["pattern_cases"] == 2


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_windowed_equals_the_whole_volume(method, dims, tmp_path):
    """A network that sees one voxel at a time, with the same patterns: windows do not matter at all."""
    torch.manual_seed(0)
    conv, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[dims]
    network = nn.Sequential(conv(2, 6, 1), norm(6), nn.LeakyReLU(), conv(6, 3, 1)).double().eval()
    network[1].running_mean.normal_()
    image = torch.rand(2, *[12] * dims, dtype=DOUBLE)
    whole = objective_of(network, image, [MultiClassMask(1)])
    windowed = objective_of(network, image, [MultiClassMask(1)], SlidingWindowInferer((8,) * dims, 2, 0.5, "gaussian"))
    FittedPatterns.fit([whole.derive(image=image.flip(-1)), whole.derive(image=image**2)]).save(tmp_path / "p.pt")
    actual = method(patterns=tmp_path / "p.pt")
    close(explain(actual, windowed).maps, explain(actual, whole).maps)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_signal_of_an_image_is_found(dims):
    """Images y s + z d: the filter is orthogonal to d and looks nothing like s; PatternNet shows s."""
    generator = torch.Generator().manual_seed(0)
    shape = [6] * dims
    signal, distractor = torch.zeros(2, *shape, dtype=DOUBLE)
    signal[(slice(2, 4),) * dims] = 1.0
    distractor[(slice(0, 4),) * dims] = 1.0
    y, z = torch.randn(2, 400, *[1] * dims, dtype=DOUBLE, generator=generator)
    images = (y * signal + 3 * z * distractor)[:, None]
    basis = torch.stack([signal.flatten(), distractor.flatten()])
    filter_ = torch.linalg.pinv(basis).T[0]  # wᵀs = 1, wᵀd = 0
    network = nn.Sequential(nn.Flatten(), nn.Linear(6**dims, 1, bias=False)).double().eval()
    with torch.no_grad():
        network[1].weight.copy_(filter_[None])
    objective = objective_of(network, images[0], [ClassScore(0)])
    result = explain(PatternNet(cases=list(images)), objective).maps[0, 0]

    def likeness(a, b):
        return float((a * b).sum() / (a.norm() * b.norm()))

    assert likeness(result * y[0].sign(), signal) > 0.97
    assert likeness(filter_.reshape(shape), signal) < 0.95
    share = explain(PatternAttribution(cases=list(images)), objective).maps
    close(share.sum()[None], objective.image_values())


def test_patterns_are_written_beside_the_weights(tmp_path):
    s = setting("UNet_batch")
    file, cases = tmp_path / "patterns.pt", [s.image.flip(-1), s.image * 2]
    first = explain(PatternAttribution(file, cases), s.objective)
    assert file.is_file()
    assert [f.name for f in tmp_path.iterdir()] == ["patterns.pt"]
    again = explain(PatternAttribution(file), s.objective)
    assert torch.equal(first.maps, again.maps)
    with torch.no_grad():
        next(s.network.parameters()).add_(1e-3)
    with pytest.raises(MethodError, match="other weights"):
        explain(PatternAttribution(file), s.objective)


def test_a_case_may_be_a_file(tmp_path):
    s = setting("UNet_batch")
    nib.save(nib.Nifti1Image(s.image[0].numpy(), torch.eye(4).numpy()), tmp_path / "case.nii.gz")
    one, other = (explain(PatternNet(cases=[c]), s.objective).maps for c in (s.image, tmp_path / "case.nii.gz"))
    close(other, one, 1e-5)  # the file is read in float32


def test_what_cannot_work_is_named(tmp_path):
    with pytest.raises(UsageError, match="esegeta-monai patterns"):
        PatternNet()
    s = setting("UNet_batch")
    with pytest.raises(UsageError, match=r"no file none\.pt"):
        explain(PatternNet(tmp_path / "none.pt"), s.objective)
    for content in (b"nonsense", b""):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.pt cannot be read"):
            explain(PatternNet(tmp_path / "bad.pt"), s.objective)
    torch.save(s.network.state_dict(), tmp_path / "model.pt")
    with pytest.raises(UsageError, match="has no patterns"):
        explain(PatternNet(tmp_path / "model.pt"), s.objective)
    transformer = setting("UNETR")
    with pytest.raises(RuleError, match="no linear neuron"):
        explain(PatternNet(cases=[transformer.image]), transformer.objective)
    method = PatternNet(cases=[s.image])
    with pytest.raises(MethodError, match="output='logit'"):
        list(Explainer(s.network, s.inferer)(s.image[None], [method], [MultiClassMask(1, output="probability")]))
