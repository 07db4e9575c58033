"""From attributions to files: names, grids, order of writing, what counts as finished."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, EnsureChannelFirst, LoadImage, Orientation, RandSpatialCrop, Spacing
from torch import nn

import esegeta_monai.output.writer as module
from esegeta_monai import Attribution, Explainer
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.explain.record import DECIDES
from esegeta_monai.files.grids.resample import scan_of, to_scan_grid
from esegeta_monai.files.journal import read_run
from esegeta_monai.methods import (
    DeepDream,
    FeatureAblation,
    FeatureVisualization,
    GradCam,
    InputXGradient,
    InvertedRepresentation,
    LayerActivation,
    Occlusion,
    Saliency,
)
from esegeta_monai.methods.base import Method
from esegeta_monai.output.report.cohort import results_csv
from esegeta_monai.output.report.collect import read_output
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets import Box, MultiClassMask, PredictedClasses, Target, ThresholdMask
from tests.support import oblique


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oblique.write_scan(tmp_path_factory.mktemp("scans") / "alpha.nii.gz")


def preprocessing() -> Compose:
    return Compose([LoadImage(), EnsureChannelFirst(), Orientation("RAS", labels=None), Spacing((1.6, 1.6, 1.6))])


@pytest.fixture(scope="module")
def image(scan: Path) -> MetaTensor:
    return preprocessing()(str(scan))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 3, padding=1))


def explain(
    folder: Path,
    image: MetaTensor,
    methods: list[Method] | None = None,
    targets: list[Target] | None = None,
    case: str = "alpha",
    **options: Any,
) -> ResultWriter:
    """One case by a writer of its own."""
    methods, targets = methods or [Saliency()], targets or [Box(1, (0, 0, 0), (6, 6, 6))]
    writer = ResultWriter(folder, methods, targets, **{"pictures": False, **options})
    writer.explain(Explainer(network(), on_error="record"), image, case, methods, targets)
    return writer


def entries(writer: ResultWriter) -> list[dict[str, Any]]:
    return read_run(writer.output_dir).results


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and not p.name.startswith("run.json"))


def test_map_picture_and_sidecar_are_in_one_folder(image: MetaTensor, tmp_path: Path) -> None:
    writer = explain(tmp_path, image, [InputXGradient()], pictures=True)
    stem = "alpha_Box-class1_InputXGradient_attr"
    copies = ["alpha_Box-class1_mask.nii.gz", "alpha_scan.nii.gz"]
    assert names(tmp_path) == sorted([f"{stem}.json", f"{stem}.nii.gz", f"{stem}.png", *copies])
    (entry,) = entries(writer)
    assert entry["map"] == f"alpha/{stem}.nii.gz"
    assert (entry["status"], entry["target"], entry["method"]) == ("ok", "Box-class1", "InputXGradient")
    record = json.loads((tmp_path / "alpha" / f"{stem}.json").read_text(encoding="utf-8"))
    assert record["picture"]["convention"] == "radiological"
    assert record["intended_use"].startswith("Research only")


@pytest.mark.parametrize(
    "method", [InputXGradient(), GradCam(layer="0"), LayerActivation(layer="0", reduce="channels")]
)
def test_every_kind_of_map_has_the_grid_of_the_scan(
    scan: Path, image: MetaTensor, tmp_path: Path, method: Method
) -> None:
    explain(tmp_path, image, [method])
    (path,) = tmp_path.rglob("*_attr.nii.gz")
    result, reference = nib.load(path), nib.load(scan)
    channels = (3,) if method.name == "LayerActivation" else ()
    assert result.shape == (*reference.shape, *channels)
    assert result.affine.tobytes() == reference.affine.tobytes()
    assert int(result.header["sform_code"]) == 2
    assert int(result.header["qform_code"]) == 1
    assert np.asarray(result.dataobj).any()


def test_a_layers_channels_are_drawn_on_the_scan(image: MetaTensor, tmp_path: Path) -> None:
    writer = explain(tmp_path, image, [LayerActivation(layer="0", reduce="channels")], pictures=True)
    assert [e["status"] for e in entries(writer)] == ["ok"]
    assert len(list(tmp_path.rglob("*.png"))) == 1


def test_maps_that_do_not_add_up_equal_monais_inversion(scan: Path) -> None:
    """Interpolation in world coordinates is what Invertd does, but for the last half voxel of the border."""
    transforms = preprocessing()
    image = transforms(str(scan))
    smooth = MetaTensor(torch.linspace(0, 1, image[0].numel()).reshape(image.shape), meta=image.meta,
                        applied_operations=image.applied_operations)  # fmt: skip
    back, sums = to_scan_grid(smooth, module.storage.read_scan(scan), additive=False)
    undone = transforms.inverse(smooth.clone())
    inner = (slice(None), *[slice(2, -2)] * 3)
    assert sums == {}
    assert (back[inner] - undone.as_tensor()[inner]).abs().max() < 1e-4


def test_additive_maps_without_a_trace_are_refused(scan: Path, image: MetaTensor) -> None:
    bare = MetaTensor(torch.ones_like(image.as_tensor()), affine=image.affine)
    with pytest.raises(MethodError, match="left no trace"):
        to_scan_grid(bare, module.storage.read_scan(scan), additive=True)


@pytest.mark.parametrize("additive", [False, True])
def test_slices_of_a_volume_are_refused_with_the_way_out(scan: Path, additive: bool) -> None:
    whole = Compose([LoadImage(), EnsureChannelFirst()])(str(scan))
    with pytest.raises(MethodError, match=r"saw a slice of .* SliceInferer"):
        to_scan_grid(RandSpatialCrop((-1, -1, 1), random_size=False)(whole)[..., 0], whole, additive=additive)


def test_maps_on_the_scans_own_grid_stay_bit_by_bit(scan: Path) -> None:
    volume = module.storage.read_scan(scan)
    values = MetaTensor(torch.rand(volume.shape), affine=volume.affine)
    for additive in (True, False):
        assert torch.equal(to_scan_grid(values, volume, additive=additive)[0], values.as_tensor())


def test_the_scan_is_the_file_where_it_still_is(scan: Path, image: MetaTensor, tmp_path: Path) -> None:
    assert scan_of(image) == scan
    gone = MetaTensor(image.as_tensor(), meta={**image.meta, "filename_or_obj": str(tmp_path / "gone.nii.gz")})
    assert scan_of(gone) is gone
    several = MetaTensor(image.as_tensor(), meta={**image.meta, "filename_or_obj": [str(scan)]})
    assert scan_of(several) == scan


def test_several_files_as_channels_give_one_4d_map(scan: Path, tmp_path: Path) -> None:
    second = oblique.write_scan(tmp_path / "in" / "beta.nii.gz", 1)
    load = Compose([LoadImage(), EnsureChannelFirst(), Spacing((1.6, 1.6, 1.6))], map_items=False)
    image = load([str(scan), str(second)])
    assert image.shape[0] == 2
    methods, targets = [InputXGradient()], [Box(1, (0, 0, 0), (6, 6, 6))]
    writer = ResultWriter(tmp_path / "out", methods, targets)
    explainer = Explainer(nn.Conv3d(2, 2, 3, padding=1), on_error="record", channel_names=["T1", "T2"])
    writer.explain(explainer, image, "both", methods, targets)
    assert [e["status"] for e in entries(writer)] == ["ok"]
    (path,) = (tmp_path / "out").rglob("*_attr.nii.gz")
    assert nib.load(path).shape == (*oblique.SHAPE, 2)
    assert json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text(encoding="utf-8"))[
        "channel_names"
    ] == [
        "T1",
        "T2",
    ]


# ---- finished or not ----------------------------------------------------------------------------------------------


def test_finished_maps_are_skipped(image: MetaTensor, tmp_path: Path) -> None:
    explain(tmp_path, image)
    again = explain(tmp_path, image)
    assert [e["status"] for e in entries(again)] == ["skipped"]
    assert again.run.exit_code == 0
    over = explain(tmp_path, image, overwrite=True)
    assert [e["status"] for e in entries(over)] == ["ok"]


def test_whatever_decides_computes_again(image: MetaTensor, scan: Path, tmp_path: Path) -> None:
    """A sidecar that differs in any one field, or lacks it, is not this run's."""
    methods, targets = [Saliency()], [Box(1, (0, 0, 0), (6, 6, 6))]
    writer = ResultWriter(tmp_path, methods, targets, provenance={"bundle": "ours"}, pictures=False)
    asked: list[Attribution] = []
    explainer = Explainer(network())
    writer.explain(explainer, image, "alpha", methods, targets)
    assert list(explainer(image[None], methods, targets, skip=lambda a: not asked.append(a))) == []
    (waiting,), (sidecar,) = asked, tmp_path.rglob("*_attr.json")
    whole = json.loads(sidecar.read_text(encoding="utf-8"))
    for field in (*DECIDES, "bundle", "case", "scan_sha256"):
        for changed in ({**whole, field: "other"}, {k: v for k, v in whole.items() if k != field}):
            sidecar.write_text(json.dumps(changed), encoding="utf-8")
            assert not writer.is_done(waiting, "alpha", scan), field
    sidecar.write_text(json.dumps(whole), encoding="utf-8")
    assert writer.is_done(waiting, "alpha", scan)


@pytest.mark.parametrize("damage", ["cut", "gone", "no sidecar", "sidecar cut", "another provenance"])
def test_what_is_not_whole_is_computed_again(image: MetaTensor, tmp_path: Path, damage: str) -> None:
    explain(tmp_path, image)
    (path,), (sidecar,) = tmp_path.rglob("*_attr.nii.gz"), tmp_path.rglob("*_attr.json")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "gone":
        path.unlink()
    elif damage == "no sidecar":
        sidecar.unlink()
    elif damage == "sidecar cut":
        sidecar.write_text(sidecar.read_text(encoding="utf-8")[:100], encoding="utf-8")
    more = {"provenance": {"weights_sha256": "others"}} if damage == "another provenance" else {}
    assert [e["status"] for e in entries(explain(tmp_path, image, **more))] == ["ok"]
    assert np.isfinite(np.asarray(nib.load(path).dataobj)).all()


def test_a_target_that_became_empty_takes_its_old_map_away(image: MetaTensor, tmp_path: Path) -> None:
    """The map of another prediction must not stay beside a sidecar without a map."""
    high = ThresholdMask(-1e9, value="raw", name="above")
    explain(tmp_path, image, targets=[high], pictures=True)
    assert len(names(tmp_path)) == 5
    never = ThresholdMask(1e9, value="raw", name="above")
    writer = explain(tmp_path, image, targets=[never], pictures=True)
    assert [e["status"] for e in entries(writer)] == ["empty_target"]
    assert names(tmp_path) == ["alpha_above_Saliency_attr.json", "alpha_scan.nii.gz"]
    assert "map" not in json.loads(next(tmp_path.rglob("*_attr.json")).read_text(encoding="utf-8"))


def test_the_picture_of_an_older_map_goes_away(image: MetaTensor, tmp_path: Path) -> None:
    explain(tmp_path, image, pictures=True)
    explain(tmp_path, image, overwrite=True, pictures=False)
    assert not list(tmp_path.rglob("*.png"))


def test_the_sidecar_comes_last(image: MetaTensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that fails leaves a whole map without a sidecar: recorded as failed, and done again next time."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts")

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_picture", fails)
        writer = explain(tmp_path, image, [Saliency(), InputXGradient()], pictures=True)
    assert {e["status"] for e in entries(writer)} == {"failed"}
    assert {e["reason"] for e in entries(writer)} == {"RuntimeError: no fonts"}
    assert writer.run.exit_code == 1
    assert not list(tmp_path.rglob("*_attr.json"))
    again = explain(tmp_path, image, [Saliency(), InputXGradient()], pictures=True)
    assert {e["status"] for e in entries(again)} == {"ok"}


def test_failures_are_recorded_and_write_nothing(image: MetaTensor, tmp_path: Path) -> None:
    writer = explain(tmp_path, image, [GradCam(layer="nowhere"), Saliency()])
    assert {e["method"]: e["status"] for e in entries(writer)} == {"GradCam": "failed", "Saliency": "ok"}
    assert all("Saliency" in n for n in names(tmp_path))


def test_a_case_that_cannot_be_explained_is_recorded(image: MetaTensor, tmp_path: Path) -> None:
    bad = image.clone()
    bad[0, 3, 3, 3] = torch.inf
    writer = explain(tmp_path, bad)
    assert [(e["case"], e["status"]) for e in entries(writer)] == [("alpha", "failed")]
    assert "NaN or infinite" in entries(writer)[0]["reason"]
    assert names(tmp_path) == []


def test_results_stand_as_asked_for_in_record_report_and_table(image: MetaTensor, tmp_path: Path) -> None:
    """The gradients share passes and end together, also the one that was asked for last."""
    methods = [InputXGradient(), Occlusion(window=12), GradCam(layer="nowhere"), Saliency()]
    targets: list[Target] = [Box(1, (2, 2, 2), (6, 6, 6)), Box(0, (0, 0, 0), (6, 6, 6))]
    wanted = [(str(m.name), f"Box-class{k}") for m in methods for k in (1, 0)]

    def explained(*some: Method) -> None:
        writer = ResultWriter(tmp_path, some or methods, targets, pictures=False, cases=["beta", "alpha"])
        for case in ("alpha", "beta"):
            explainer = Explainer(network(), on_error="record")
            writer.explain(explainer, image, case, some or methods, targets)
        writer.run.write()

    def check() -> None:
        contents = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["results"]
        assert [(e["case"], e["method"]) for e in contents] == [(c, m) for c in ("beta", "alpha") for m, _ in wanted]
        run = read_output(tmp_path)
        assert [case.name for case in run.cases] == ["beta", "alpha"]
        for case in run.cases:
            assert case.methods == [m.name for m in methods]
            assert [(r.method, str(r.target)[: len("Box-class1")]) for r in case.explained] == wanted
        rows = [row for row in csv.DictReader(results_csv(run.cases).splitlines()) if row["case"] == "alpha"]
        assert [*dict.fromkeys((row["method"], row["target"][: len("Box-class1")]) for row in rows)] == wanted

    explained()
    ends = [json.loads(line).get("method") for line in (tmp_path / "run.jsonl").read_text("utf-8").splitlines() if line]
    assert ends.index("Saliency") < ends.index("Occlusion"), "they end in another order"
    check()
    next((tmp_path / "alpha").glob("*class1*InputXGradient*.json")).unlink()
    explained()  # a resume: one map is missing
    check()


# ---- names --------------------------------------------------------------------------------------------------------


def test_two_of_one_kind_get_distinct_names(image: MetaTensor, tmp_path: Path) -> None:
    explain(tmp_path, image, [Occlusion(window=8), Occlusion(window=12)], [MultiClassMask(0), MultiClassMask(1)])
    result = {n.removesuffix(".nii.gz") for n in names(tmp_path) if n.endswith(".nii.gz")}
    expected = {f"alpha_MultiClassMask-class{c}_Occlusion-window{w}_attr" for c in (0, 1) for w in (8, 12)}
    assert result <= expected
    assert result


def test_every_target_of_one_kind_has_its_status(image: MetaTensor, tmp_path: Path) -> None:
    """In run.json, in the sidecar and on disk by the same name."""
    targets: list[Target] = [Box(1, (0, 0, 0), (6, 6, 6)), Box(1, (2, 2, 2), (6, 6, 6))]
    first = entries(explain(tmp_path, image, targets=targets))
    expected = ["Box-class1-start0x0x0", "Box-class1-start2x2x2"]
    assert [e["target"] for e in first] == expected
    again = entries(explain(tmp_path, image, targets=targets))
    assert [(e["target"], e["status"]) for e in again] == [(name, "skipped") for name in expected]
    for e in first:
        sidecar = tmp_path / e["map"].replace(".nii.gz", ".json")
        assert json.loads(sidecar.read_text(encoding="utf-8"))["result"]["target"] == e["target"]
        assert e["target"] in sidecar.name


def test_methods_that_the_writer_does_not_know_are_refused_by_name(image: MetaTensor, tmp_path: Path) -> None:
    targets: list[Target] = [Box(1, (0, 0, 0), (6, 6, 6))]
    writer = ResultWriter(tmp_path, [Saliency()], targets)
    with pytest.raises(UsageError, match="one of the methods of this run"):
        writer.explain(Explainer(network()), image, "alpha", [Saliency()], targets)


def test_given_names_are_taken(image: MetaTensor, tmp_path: Path) -> None:
    explain(tmp_path, image, [Saliency(name="gradient")], [Box(1, (0, 0, 0), (6, 6, 6), name="corner")])
    assert names(tmp_path)[1] == "alpha_corner_gradient_attr.nii.gz"


def test_clashes_stop_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="both be called"):
        ResultWriter(tmp_path / "out", [Saliency(name="a"), GradCam(name="A")], [])
    assert not (tmp_path / "out").exists()


def test_a_map_never_overwrites_another_of_the_run(image: MetaTensor, tmp_path: Path) -> None:
    """Labels are known only with the prediction: of two targets with one label, the second fails with an error."""
    targets: list[Target] = [MultiClassMask(1), PredictedClasses(output="probability", background=None)]
    writer = explain(tmp_path, image, targets=targets)
    clashing = [e for e in entries(writer) if e["status"] == "failed"]
    (first,) = [e for e in entries(writer) if e["target"] == "MultiClassMask-class1"]
    assert first["status"] == "ok"
    assert len(clashing) == 1
    assert "is the map of 'alpha', MultiClassMask" in clashing[0]["reason"]
    (path,) = tmp_path.rglob("*MultiClassMask-class1*.json")
    assert json.loads(path.read_text(encoding="utf-8"))["target_parameters"]["output"] == "logit"


def test_cases_that_would_share_a_file_stay_apart(image: MetaTensor, tmp_path: Path) -> None:
    methods, targets = [Saliency()], [Box(1, (0, 0, 0), (6, 6, 6))]
    writer = ResultWriter(tmp_path, methods, targets, pictures=False)
    explainer = Explainer(network(), on_error="record")
    for case in ("one two", "one-two"):
        writer.explain(explainer, image, case, methods, targets)
    assert [(e["case"], e["status"]) for e in entries(writer)] == [("one two", "ok"), ("one-two", "failed")]
    assert json.loads(next(tmp_path.rglob("*_attr.json")).read_text(encoding="utf-8"))["case"] == "one two"


def test_flat_layout_and_plain_nifti(image: MetaTensor, tmp_path: Path) -> None:
    explain(tmp_path, image, separate_folder=False, extension=".nii", postfix="map")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "alpha_Box-class1_Saliency_map.json",
        "alpha_Box-class1_Saliency_map.nii",
        "run.jsonl",
    ]


def test_unwritable_folders_are_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot write"):
        ResultWriter(tmp_path / "file" / "out", [Saliency()], [])


def test_writing_by_hand(image: MetaTensor, scan: Path, tmp_path: Path) -> None:
    """`write` alone, for loops of one's own."""
    methods, targets = [Saliency()], [Box(1, (0, 0, 0), (6, 6, 6))]
    writer = ResultWriter(tmp_path, methods, targets, pictures=False)
    paths = []
    for attribution in Explainer(network())(image[None], methods, targets):
        assert isinstance(attribution, Attribution)
        assert not writer.is_done(attribution, "alpha", scan)
        paths.append(writer.write(attribution, "alpha", image))
        assert writer.is_done(attribution, "alpha", scan)
    assert [p.exists() for p in paths if p] == [True]


def test_a_label_map_by_key_names_the_features_of_a_table_beside_the_map(tmp_path, image):
    """The label map lies on another grid; its features come out under their own names."""
    labels = torch.zeros(image.shape)
    labels[..., : image.shape[-1] // 2] = 1
    labels[..., image.shape[-1] // 2 :] = 2
    atlas = Spacing((3.0, 2.0, 2.0), mode="nearest")(MetaTensor(labels, affine=image.affine))
    method = FeatureAblation(feature_mask="key:atlas", baseline=0.0)
    writer = ResultWriter(tmp_path, [method], [MultiClassMask(1)])
    (result,) = Explainer(network())(image[None], [method], [MultiClassMask(1)], data={"atlas": atlas})
    path = writer.write(result, "alpha", image)
    rows = path.with_name(path.name.replace(".nii.gz", ".csv")).read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3
    values = result.map.as_tensor().unique()
    assert sorted(row["value"] for row in result.record["features"]) == pytest.approx(sorted(values.tolist()), rel=1e-5)


def test_a_synthesised_image_is_written_as_an_image(tmp_path, image, scan):
    """On the scan's oblique grid by interpolation, black outside, with a grey picture and its curve beside it."""
    methods: list[Method] = [FeatureVisualization(n_iter=4, intensity=(-2, 6)), DeepDream("0", n_iter=1)]
    methods.append(InvertedRepresentation("0", n_iter=3))
    targets: list[Target] = [MultiClassMask(1)]
    writer = ResultWriter(tmp_path, methods, targets)
    writer.explain(Explainer(network(), SlidingWindowInferer((8, 8, 8))), image, "alpha", methods, targets)
    assert writer.run.summary == {"ok": 3}
    for method in methods:
        stem = tmp_path / "alpha" / f"alpha_MultiClassMask-class1_{method.name}_attr"
        record = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        result, source = nib.load(f"{stem}.nii.gz"), nib.load(scan)
        assert result.shape == source.shape
        assert np.allclose(result.affine, source.affine)
        ((low, high),) = record["intensity_range"]
        assert (result.header["cal_min"], result.header["cal_max"]) == pytest.approx((low, high), rel=1e-6)
        assert "sum_scan_grid" not in record
        assert record["units"] == "intensity of the network's input"
        assert record["produces"] == "synthesised image"
        assert len(record["curve"]) >= 1
        for suffix in (".png", "_curve.png"):
            assert Path(f"{stem}{suffix}").stat().st_size > 1000
    values = nib.load(tmp_path / "alpha" / "alpha_MultiClassMask-class1_FeatureVisualization_attr.nii.gz").get_fdata()
    place = json.loads(
        (tmp_path / "alpha" / "alpha_MultiClassMask-class1_FeatureVisualization_attr.json").read_text(encoding="utf-8")
    )["place"]
    assert values.min() == pytest.approx(-2, abs=1e-5)
    index = np.moveaxis(np.indices(values.shape), 0, -1) + 0.0
    there = index @ (np.linalg.inv(image.affine.numpy()) @ nib.load(scan).affine)[:3, :3].T
    there += (np.linalg.inv(image.affine.numpy()) @ nib.load(scan).affine)[:3, 3]
    deep = np.all([(there[..., a] > lo + 1) & (there[..., a] < hi - 2) for a, (lo, hi) in enumerate(place)], axis=0)
    far = np.any([(there[..., a] < lo - 1) | (there[..., a] > hi) for a, (lo, hi) in enumerate(place)], axis=0)
    assert deep.any()
    assert far.any()
    assert np.allclose(values[far], -2, atol=1e-5)
    assert values[deep].min() > 0  # grey noise in the middle of the range
