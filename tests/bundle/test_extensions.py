"""Methods, targets and metrics from outside the package: a bundle's scripts/, and another installed package."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import monai.bundle
import nibabel as nib
import pytest
import torch

import esegeta_monai.bundle
from esegeta_monai import Explainer
from esegeta_monai.bundle.extensions import register_extensions
from esegeta_monai.cli.main import main
from esegeta_monai.engine.rules import RULES, registration
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import METHODS
from esegeta_monai.metrics.base import METRICS, MetricInput
from esegeta_monai.targets.base import TARGETS
from tests.support import oblique
from tests.support.cli import make_bundle, make_scan, run_json, statuses

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
METHOD = '''
from esegeta_monai.methods import Explained, InputGradient, Method


class SteepGradient(Method):
    """The gradient, times a factor.

    Args:
        factor: of the gradient.
    """

    reference = "nobody 2030"
    aliases = ("steep",)
    produces = "input map"
    additive = False
    units = "target per unit of image intensity"
    factor: float = 2.0

    def attribute(self, objective):
        gradient = yield InputGradient()
        return Explained(self.factor * gradient.maps[:, 0])
'''
PLAIN = '''
from esegeta_monai.methods import Method


class OnlyGradient(Method):
    """Not a dataclass."""

    produces = "input map"
    additive = False
    units = "target per unit of image intensity"

    def __init__(self, sign: int = 1, name=None):
        self.sign, self.name = sign, name

    def attribute(self, objective):
        return self.sign * objective.gradient(objective.image[None]).maps[:, 0]
'''
TARGET = '''
from esegeta_monai.targets import Box, Target


class Corner(Target):
    """The first voxels of a class."""

    class_index: int | str = 1
    size: int = 4

    def bind(self, prediction, case):
        return Box(self.class_index, (0,) * 3, (self.size,) * 3, name="Corner").bind(prediction, case)
'''

METRIC = '''
from esegeta_monai.metrics import Metric, MetricResult, magnitude


class CentreDistance(Metric):
    """How far the map's centre of mass lies from the middle of the image.

    Args:
        power: of the values.
    """

    group = "localisation"
    aliases = ("centre",)
    higher_is_better = False
    meaning = "voxels from the middle of the image to the map's centre of mass"
    power: float = 1.0

    def measure(self, subject):
        values = magnitude(subject.map) ** self.power
        where = values.nonzero().double()
        weights = values[values != 0]
        centre = (where * weights[:, None]).sum(0) / weights.sum()
        middle = (centre.new_tensor(values.shape) - 1) / 2
        return MetricResult(float((centre - middle).norm()))
'''


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch):
    """Scripts and classes that a test brings are gone after it."""
    for registry in (METHODS, TARGETS, METRICS):
        list(registry)  # entry points are loaded
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("scripts", "outside"):
            del sys.modules[name]


def bundle_with(folder: Path, **scripts: str) -> Path:
    bundle = make_bundle(folder)
    (bundle / "scripts").mkdir()
    for name, source in scripts.items():
        (bundle / "scripts" / f"{name}.py").write_text(source, encoding="utf-8")
    return bundle


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_bundle_s_own_are_listed(tmp_path, capsys):
    bundle = bundle_with(tmp_path / "b", __init__="", mine=METHOD, plain=PLAIN, corner=TARGET, other="raise OSError")
    assert run("methods", "--bundle", bundle, "--json") == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["SteepGradient"]["parameters"] == {"factor": 2.0}
    assert entries["SteepGradient"]["summary"] == "The gradient, times a factor."
    assert entries["SteepGradient"]["reference"] == "nobody 2030"
    assert entries["OnlyGradient"]["parameters"] == {"sign": 1}
    assert {"Saliency", "LRP"} <= set(entries)
    assert run("methods", "steep", "--bundle", bundle) == 0
    assert "factor=2.0" in capsys.readouterr().out
    assert run("targets", "--bundle", bundle) == 0
    assert "Corner(class_index=1, size=4)" in capsys.readouterr().out


@pytest.mark.parametrize("prefix", ["", "scripts."])
def test_a_bundle_s_own_are_run(tmp_path, prefix):
    bundle = bundle_with(tmp_path / "b", mine=METHOD, plain=PLAIN, corner=TARGET)
    names = ("mine.SteepGradient", "plain.OnlyGradient", "corner.Corner")
    steep, only, corner = (f"scripts.{n}" if prefix else n.partition(".")[2] for n in names)
    scan, out = make_scan(tmp_path / "s.nii.gz"), tmp_path / "out"
    words = ["--bundle", bundle, "--input", scan, "--output", out, "--target", f"{corner}(class_index='grey matter')"]
    methods = f"{steep}(factor=3),{only}(sign=-1),Saliency(abs=False)"
    assert run("explain", *words, "--methods", methods) == 0
    assert set(statuses(out).values()) == {"ok"}
    maps = {entry["method"]: entry for entry in run_json(out)["results"]}
    assert set(maps) == {"SteepGradient", "OnlyGradient", "Saliency"}
    (record,) = [json.loads(f.read_text(encoding="utf-8")) for f in out.rglob("*SteepGradient*.json")]
    assert record["parameters"] == {"factor": 3}
    assert record["passes_shared_with"] == ["SteepGradient", "Saliency"]  # run like our own
    read = {name: nib.load(next(out.rglob(f"*{name}*.nii.gz"))).get_fdata() for name in maps}
    assert abs(read["SteepGradient"] - 3 * read["Saliency"]).max() <= 1e-5 * abs(read["SteepGradient"]).max()
    assert abs(read["OnlyGradient"] + read["Saliency"]).max() <= 1e-5 * abs(read["Saliency"]).max()


def test_a_bundle_s_own_are_run_by_the_overlay(tmp_path):
    """By name and by ``_target_``, in ``monai.bundle run``."""
    scan = oblique.write_scan(tmp_path / "scans" / "alpha.nii.gz", 0)
    bundle = oblique.write(tmp_path / "b", oblique.config([scan], tmp_path / "b" / "eval"))
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "mine.py").write_text(METHOD, encoding="utf-8")
    (bundle / "scripts" / "corner.py").write_text(TARGET, encoding="utf-8")
    overlay = Path(esegeta_monai.bundle.__file__).parent / "explain.json"
    files = [str(bundle / "configs" / "inference.json"), str(overlay)]
    methods = ["SteepGradient(factor=3)", {"_target_": "scripts.mine.SteepGradient", "name": "four", "factor": 4}]
    monai.bundle.run(
        config_file=files,
        bundle_root=str(bundle),
        explain_methods=methods,
        explain_targets="Corner(size=6)",
    )
    read = {f.name.split("_")[-2]: nib.load(f).get_fdata() for f in (bundle / "eval").rglob("*_attr.nii.gz")}
    assert set(read) == {"SteepGradient", "four"}
    largest = abs(read["four"]).max()
    assert largest > 0
    assert abs(read["SteepGradient"] / 3 - read["four"] / 4).max() <= 1e-5 * largest


def test_the_examples_of_the_documentation_work_in_a_bundle(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("esegeta_monai.engine.rules.registration.RULES", dict(RULES))
    monkeypatch.setattr("esegeta_monai.engine.rules.composites.RULES", registration.RULES)
    examples = ("gradient_method", "perturbation_method", "shared_passes", "metric", "target", "backward_rule")
    bundle = bundle_with(
        tmp_path / "b", **{name: (EXAMPLES / f"{name}.py").read_text(encoding="utf-8") for name in examples}
    )
    listed = {}
    for kind in ("methods", "targets", "metrics"):
        assert run(kind, "--bundle", bundle, "--json") == 0
        listed[kind] = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert {"DeviationXGradient", "SlabOcclusion", "PositiveCam"} <= listed["methods"]
    assert "MostConfident" in listed["targets"]
    assert "CentreDistance" in listed["metrics"]
    scan, output = make_scan(tmp_path / "s.nii.gz"), tmp_path / "out"
    lrp = "LRP(composite={'convolution': 'Absolute', 'dense': 'Absolute'})"
    methods = f"DeviationXGradient(scale=2),SlabOcclusion(thickness=8),{lrp}"
    words = ["--bundle", bundle, "--input", scan, "--target", "MostConfident('grey matter', share=0.2)"]
    assert run("explain", *words, "--output", output, "--methods", methods) == 0
    assert len(statuses(output)) == 3
    assert set(statuses(output).values()) == {"ok"}


def judged(output: Path) -> dict[str, float]:
    """Values by metric, of the one map that was judged."""
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        return {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}


def test_a_bundle_s_metric_is_listed_and_found_by_command_and_overlay(tmp_path, capsys):
    scan = oblique.write_scan(tmp_path / "scans" / "alpha.nii.gz", 0)
    bundle = oblique.write(tmp_path / "b", oblique.config([scan], tmp_path / "b" / "eval"))
    (bundle / "scripts").mkdir()
    (bundle / "scripts" / "distance.py").write_text(METRIC, encoding="utf-8")
    assert run("metrics", "--bundle", bundle, "--json") == 0
    entries = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["CentreDistance"]["parameters"] == {"power": 1.0}
    assert entries["CentreDistance"]["aliases"] == ["centre"]
    metrics = "CentreDistance,centre(power=2, name='Squared')"
    what = ["--methods", "Saliency", "--target", "MultiClassMask(class_index=1)", "--metrics", metrics, "--no-controls"]
    assert run("evaluate", "--bundle", bundle, "--input", scan, "--output", tmp_path / "out", *what) == 0
    by_command = judged(tmp_path / "out")
    assert set(by_command) == {"CentreDistance", "Squared"}
    assert by_command["CentreDistance"] > 0
    assert by_command["CentreDistance"] != by_command["Squared"]
    overlay = Path(esegeta_monai.bundle.__file__).parent / "explain_metrics.json"
    monai.bundle.run(
        config_file=[str(bundle / "configs" / "inference.json"), str(overlay)],
        bundle_root=str(bundle),
        explain_methods="Saliency",
        explain_targets="MultiClassMask(class_index=1)",
        explain_metrics=[
            {"_target_": "scripts.distance.CentreDistance"},
            "centre(power=2, name='Squared')",
        ],
        **{"explain_metrics_handler#controls": False},
    )
    assert judged(bundle / "eval") == by_command


def test_a_bundle_s_metric_measures(tmp_path):
    register_extensions(bundle_with(tmp_path / "b", distance=METRIC))
    values = torch.zeros(1, 9, 9)
    values[0, 4, 7], values[0, 4, 1] = 3.0, -1.0
    assert METRICS.create("centre").update(MetricInput(values)).value == pytest.approx(1.5)  # (3·3 − 1·3) / 4
    with pytest.raises(UsageError, match=r"^CentreDistance: power='x': give a number$"):
        METRICS.get("centre")("x")


def test_a_bundle_s_backward_rule_is_a_word_of_composites(tmp_path, monkeypatch):
    monkeypatch.setattr("esegeta_monai.engine.rules.registration.RULES", dict(RULES))
    monkeypatch.setattr("esegeta_monai.engine.rules.composites.RULES", registration.RULES)
    lrp = "LRP(composite={'convolution': 'Absolute', 'dense': 'Epsilon'})"
    with pytest.raises(UsageError, match="unknown rule 'Absolute'"):
        METHODS.create(lrp)
    bundle = bundle_with(tmp_path / "b", rule=(EXAMPLES / "backward_rule.py").read_text(encoding="utf-8"))
    scan, output = make_scan(tmp_path / "s.nii.gz"), tmp_path / "out"
    words = ["--bundle", bundle, "--input", scan, "--output", output, "--target", "MultiClassMask(1)"]
    assert run("explain", *words, "--methods", lrp) == 0
    assert set(statuses(output).values()) == {"ok"}


def test_as_a_config_from_python(tmp_path):
    register_extensions(bundle_with(tmp_path / "b", mine=METHOD, corner=TARGET))
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    method = {"_target_": "scripts.mine.SteepGradient", "factor": 5}
    target = {"_target_": "scripts.corner.Corner", "size": 2}
    (result,) = Explainer(network)(torch.rand(1, 1, 6, 6, 6), [method], [target])
    assert result.status == "ok"
    assert result.record["target_voxels"] == 8


def test_two_bundles_with_classes_of_one_name(tmp_path):
    for factor in (7.0, 8.0):
        register_extensions(bundle_with(tmp_path / str(factor), mine=METHOD.replace("= 2.0", f"= {factor}")))
        assert METHODS.create("SteepGradient").factor == factor


def test_what_is_wrong_is_named(tmp_path, capsys):
    broken = bundle_with(tmp_path / "a", mine="import esegeta_monai\nimport not_there_at_all\n")
    nothing = ("--input", tmp_path, "--output", tmp_path / "out")
    assert run("methods", "--bundle", broken) == 0  # it is read, not imported
    assert run("explain", "--bundle", broken, *nothing) == 2
    assert "scripts/mine.py of the bundle cannot be imported: ModuleNotFoundError" in capsys.readouterr().err
    unfinished = bundle_with(tmp_path / "d", mine="import esegeta_monai\nclass Half(\n")
    assert run("methods", "--bundle", unfinished) == 2
    assert "scripts/mine.py of the bundle is not valid Python" in capsys.readouterr().err
    vague = bundle_with(tmp_path / "c", mine=METHOD.replace('"input map"', '"input"'))
    assert run("explain", "--bundle", vague, *nothing) == 2
    assert "cannot be imported: SteepGradient.produces='input': give 'input map'," in capsys.readouterr().err
    taken = bundle_with(tmp_path / "b", mine=METHOD.replace("SteepGradient", "Saliency"))
    with pytest.raises(UsageError, match=r"'Saliency' is taken by esegeta_monai\.methods"):
        register_extensions(taken)
    assert register_extensions(make_bundle(tmp_path / "none")) == []


def test_an_installed_package_announces_its_own(tmp_path, monkeypatch, capsys):
    """A distribution on the path whose entry points name a method, a target and a metric."""
    site = tmp_path / "site"
    (site / "outside").mkdir(parents=True)
    (site / "outside" / "__init__.py").write_text("", encoding="utf-8")
    (site / "outside" / "methods.py").write_text(METHOD, encoding="utf-8")
    (site / "outside" / "targets.py").write_text(TARGET, encoding="utf-8")
    (site / "outside" / "metrics.py").write_text(METRIC, encoding="utf-8")
    info = site / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[esegeta_monai.methods]\nsteep-gradient = outside.methods:SteepGradient\n\n"
        "[esegeta_monai.targets]\ncorner = outside.targets:Corner\n\n"
        "[esegeta_monai.metrics]\ncentre-distance = outside.metrics:CentreDistance\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(site))
    for registry in (METHODS, TARGETS, METRICS):  # as in a process that has not looked yet
        monkeypatch.setattr(registry, "_entry_points_loaded", False)
    assert run("methods", "--json") == 0
    assert "SteepGradient" in {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert run("targets", "--json") == 0
    assert "Corner" in {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert run("metrics", "--json") == 0
    assert "CentreDistance" in {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    bundle, scan = make_bundle(tmp_path / "b"), make_scan(tmp_path / "s.nii.gz")
    words = ["--methods", "steep-gradient,SteepGradient(factor=3, name='Steeper')", "--target", "Corner(2)"]
    assert run("explain", "--bundle", bundle, "--input", scan, "--output", tmp_path / "out", *words) == 0
    assert set(statuses(tmp_path / "out").values()) == {"ok"}
    words = ["--methods", "Saliency", "--target", "Corner(2)", "--metrics", "centre-distance", "--no-controls"]
    assert run("evaluate", "--bundle", bundle, "--input", scan, "--output", tmp_path / "judged", *words) == 0
    assert judged(tmp_path / "judged")["CentreDistance"] > 0
