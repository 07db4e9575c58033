"""``esegeta-monai cohort`` on folders of maps: tables, page, missing cases, hostile names, order, 2D and 3D."""

from __future__ import annotations

import csv
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer

from esegeta_monai import Explainer
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import METHODS
from esegeta_monai.output.cohort import CohortOptions, analyse, write_cohort
from esegeta_monai.output.cohort.clusters import cluster_maps
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets import TARGETS
from tests.output.cohort.test_clusters import planted
from tests.support.cohort import write_run

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def fewer_copies(monkeypatch):
    """Twenty copies in place of 200: the tests of `cluster_maps` check its error rate."""
    monkeypatch.setattr(
        "esegeta_monai.output.cohort.analysis.cluster_maps",
        lambda maps, **more: cluster_maps(maps, copies=40, resamples=3, **more),
    )


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def reference(folder, shape, affine=AFFINE):
    path = folder / "reference.nii.gz"
    values = np.random.default_rng(0).random(shape)
    nib.save(nib.Nifti1Image(values.astype(np.float32), affine), path)
    return path


def groups_file(folder, rows, columns="case,group"):
    path = folder / "groups.csv"
    path.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
    return path


def test_without_a_space_there_is_no_mean_map(tmp_path, capsys):
    out = write_run(tmp_path / "out", {f"p{i}": m for i, m in enumerate(planted(32))}, AFFINE)
    assert main(["cohort", str(out)]) == 0
    assert "No mean map: patients are not in one space" in capsys.readouterr().out
    assert not list((out / "cohort").glob("*.nii.gz"))
    page = (out / "cohort" / "cohort.html").read_text(encoding="utf-8")
    assert "No mean map" in page
    clusters = {row["case"]: row["cluster"] for row in rows_of(out / "cohort" / "cases.csv")}
    truth = {f"p{i}": i % 2 for i in range(32)}
    assert len({(clusters[case], truth[case]) for case in truth}) == 2


def test_the_folder_of_the_cohort_is_no_case_of_a_report(tmp_path):
    out = write_run(tmp_path / "out", dict(zip("ab", planted(2))), AFFINE)
    assert main(["cohort", str(out), "-q"]) == 0
    assert main(["report", str(out), "-q"]) == 0
    assert "2 cases" in (out / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", [(10, 12, 8), (14, 16, 1)])
def test_mean_map_regions_and_groups_in_a_common_space(tmp_path, shape):
    maps = planted(24, shape=shape)
    out = write_run(tmp_path / "out", {f"p{i}": m for i, m in enumerate(maps)}, AFFINE)
    labels = np.ones(shape, np.uint8)
    labels[:3, :3, :3] = 2
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "labels.nii.gz")
    table = groups_file(tmp_path, [f"p{i},{'mark' if i % 2 else 'none'}" for i in range(24)])
    words = ["cohort", str(out), "-q", "--space", str(reference(tmp_path, shape)), "--transforms", "identity"]
    words += ["--regions", str(tmp_path / "labels.nii.gz"), "--region-names", "1=rest,2=corner"]
    assert main([*words, "--groups", str(table), "--permutations", "499"]) == 0
    written = out / "cohort"
    stored = np.stack([m.astype(np.float32).astype(np.float64) for m in maps])
    stored /= np.abs(stored).sum((1, 2, 3), keepdims=True)
    stem = "ClassScore-lesion_InputXGradient.nii.gz"
    np.testing.assert_allclose(nib.load(written / f"mean_{stem}").get_fdata(), stored.mean(0), atol=1e-9)
    np.testing.assert_allclose(nib.load(written / f"variance_{stem}").get_fdata(), stored.var(0, ddof=1), atol=1e-9)
    np.testing.assert_array_equal(nib.load(written / f"mean_{stem}").affine, AFFINE)
    corner = {row["region"]: row for row in rows_of(written / "regions.csv")}["corner"]
    share = np.abs(stored[:, :3, :3, :3]).sum((1, 2, 3))
    assert float(corner["mean"]) == pytest.approx(share.mean(), rel=1e-9)
    assert float(corner["sd"]) == pytest.approx(share.std(ddof=1), rel=1e-9)
    test = {row["region"]: row for row in rows_of(written / "groups.csv")}["corner"]
    assert (test["first"], test["second"]) == ("mark", "none")
    assert float(test["p_adjusted"]) == pytest.approx(1 / 500)
    assert float(test["mean_first"]) == pytest.approx(share[1::2].mean(), rel=1e-9)
    places = [[float(row[k]) / 2 for k in ("x_mm", "y_mm", "z_mm")] for row in rows_of(written / "voxels.csv")]
    assert any(max(place) < 3 for place in places)
    p = nib.load(written / f"p_{stem}").get_fdata()
    assert (p[:3, :3, :3] <= 0.05).all()


def test_order_of_cases_and_names_do_not_matter(tmp_path):
    maps = planted(32)
    group = ["x" if i % 3 else "y" for i in range(32)]
    first = write_run(tmp_path / "a", {f"p{i}": m for i, m in enumerate(maps)}, AFFINE)
    order = np.random.default_rng(3).permutation(32)
    names = {int(i): f"z{k:02d}" for k, i in enumerate(order)}
    second = write_run(tmp_path / "b", {names[int(i)]: maps[i] for i in order}, AFFINE)
    results = []
    for out, named in ((first, {i: f"p{i}" for i in range(32)}), (second, names)):
        table = groups_file(out, [f"{named[i]},{group[i]}" for i in range(32)])
        options = CohortOptions(
            space=str(reference(tmp_path, (10, 12, 8))),
            transforms=("identity",),
            regions=str(_halves(tmp_path)),
            groups=str(table),
            permutations=199,
        )
        (result,) = analyse(out, options).families
        results.append((result, [result.cases.index(named[i]) for i in range(32)]))
    (one, here), (two, there) = results
    assert one.clusters.labels is not None
    assert two.clusters.labels is not None
    np.testing.assert_array_equal(one.clusters.labels[here], two.clusters.labels[there])
    np.testing.assert_array_equal(one.moments.mean, two.moments.mean)
    np.testing.assert_array_equal(one.groups.tests.p_adjusted, two.groups.tests.p_adjusted)
    np.testing.assert_array_equal(one.groups.voxels.p, two.groups.voxels.p)
    assert one.table == two.table
    np.testing.assert_array_equal(one.similarity[np.ix_(here, here)], two.similarity[np.ix_(there, there)])


def _halves(folder):
    labels = np.ones((10, 12, 8), np.uint8)
    labels[:5] = 2
    nib.save(nib.Nifti1Image(labels, AFFINE), folder / "halves.nii.gz")
    return folder / "halves.nii.gz"


def test_missing_failed_and_altered_cases_are_named(tmp_path, capsys):
    maps = {f"p{i}": m for i, m in enumerate(planted(6))}
    maps["zero"] = np.zeros((10, 12, 8))
    out = write_run(tmp_path / "out", maps, AFFINE, failed={"broken": "the scan is truncated"})
    nib.save(nib.Nifti1Image(np.ones((10, 12, 8), np.float32), AFFINE), next((out / "p1").glob("*.nii.gz")))
    shutil.rmtree(out / "p2")
    table = groups_file(tmp_path, [*[f"p{i},{'ab'[i % 2]}" for i in range(6)], "ghost,a"])
    assert main(["cohort", str(out), "--groups", str(table)]) == 1
    error = capsys.readouterr().err
    reasons = {row["case"]: row["reason"] for row in rows_of(out / "cohort" / "cases.csv") if row["reason"]}
    assert set(reasons) == {"p1", "p2", "broken", "ghost", "zero"}
    assert "altered" in reasons["p1"]
    assert "truncated" in reasons["broken"]
    page = (out / "cohort" / "cohort.html").read_text(encoding="utf-8")
    for name in ("p1", "p2", "broken", "ghost"):
        assert f"{name}" in error
        assert f">{name}</th>" in page


def test_a_table_of_evaluate_is_used_without_label_maps(tmp_path):
    out = write_run(tmp_path / "out", {f"p{i}": m for i, m in enumerate(planted(4))}, AFFINE)
    for i in range(4):
        lines = ["target,method,region,voxels,volume_mm3,sum,abs_sum,share_of_abs,mean,alarm"]
        lines += [f"ClassScore-lesion,InputXGradient,liver,5,5,-0.2,0.4,{0.1 * i},0,False"]
        (out / f"p{i}" / f"p{i}_regions.csv").write_text("\n".join(lines), encoding="utf-8")
    (result,) = analyse(out).families
    (row,) = result.table
    assert (row.region, row.cases) == ("liver", 4)
    assert row.mean == pytest.approx(0.15)
    assert row.signed == pytest.approx(-0.075)


def test_label_maps_per_case_on_other_grids(tmp_path):
    maps = planted(3)
    out = write_run(tmp_path / "out", {f"p{i}": m for i, m in enumerate(maps)}, AFFINE)
    (tmp_path / "labels").mkdir()
    fine = np.zeros((20, 24, 16), np.uint8)
    fine[:6, :6, :6] = 7
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = -0.5
    for i in range(3):
        nib.save(nib.Nifti1Image(fine, affine), tmp_path / "labels" / f"p{i}_organs.nii.gz")
    (result,) = analyse(out, CohortOptions(regions=str(tmp_path / "labels"))).families
    shares = {(r.case, r.region): r.share_of_abs for r in result.regions}
    for i, values in enumerate(maps):
        assert shares[f"p{i}", "label 7"] == pytest.approx(np.abs(values[:3, :3, :3]).sum(), rel=1e-5)


def test_maps_are_compared_around_the_target(tmp_path):
    """The same map around targets at different places: equal features; a class score has no place but the scan's."""
    maps, masks = {}, {}
    for i, shift in enumerate([(0, 0, 0), (5, 3, 2), (2, 6, 1)]):
        box = tuple(slice(a, a + 3) for a in shift)
        values, mask = np.zeros((16, 16, 8)), np.zeros((16, 16, 8))
        values[box], mask[box] = np.arange(27).reshape(3, 3, 3), 1
        maps[f"p{i}"], masks[f"p{i}"] = values, mask
    (result,) = analyse(write_run(tmp_path / "a", maps, AFFINE, masks)).families
    assert result.around == "the centroid of the target"
    np.testing.assert_allclose(result.similarity, 1, atol=1e-9)
    (other,) = analyse(write_run(tmp_path / "b", maps, AFFINE)).families
    assert other.around == "the centre of the scan"
    assert other.similarity[0, 1] < 0.5


def test_patients_are_the_unit(tmp_path):
    """Four scans per patient: the least p is that of six patients, not of 24 scans."""
    out = write_run(tmp_path / "out", {f"p{i}": m for i, m in enumerate(planted(24))}, AFFINE)
    rows = [f"p{i},{'ab'[i // 12]},patient{i // 4}" for i in range(24)]
    table = groups_file(tmp_path, rows, "case,group,patient")
    (result,) = analyse(out, CohortOptions(groups=str(table))).families
    assert result.groups.patients == (3, 3)
    assert result.groups.least_p == pytest.approx(0.1)
    rows[0] = "p0,b,patient0"
    with pytest.raises(UsageError, match="several values of group"):
        analyse(out, CohortOptions(groups=str(groups_file(tmp_path, rows, "case,group,patient"))))


def test_hostile_names_stay_text(tmp_path, capsys):
    names = [HOSTILE, "=1+1", "../../escape", "a&b\"'", "p{{7*7}}", "{% x %}"]
    out = write_run(tmp_path / "out", dict(zip(names, planted(6))), AFFINE, failed={"<script>x": "</title><script>y"})
    table = groups_file(
        tmp_path, [f'"{n.replace(chr(34), chr(34) * 2)}",{HOSTILE if i % 2 else "a"}' for i, n in enumerate(names)]
    )
    before = {p for p in tmp_path.rglob("*") if out not in p.parents}
    words = ["cohort", str(out), "-q", "--groups", str(table), "--target", "ClassScore-lesion"]
    words += ["--space", str(reference(out, (10, 12, 8))), "--transforms", "identity"]
    assert main(words) == 1
    page = (out / "cohort" / "cohort.html").read_text(encoding="utf-8")
    assert HOSTILE not in page
    assert "<script>y" not in page
    assert len(re.findall("<script", page)) == 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "p{{7*7}}" in page
    assert "src=x" not in re.sub("&lt;.*?&gt;", "", page)
    assert {p for p in tmp_path.rglob("*") if out not in p.parents} == before
    assert "'=1+1" in (out / "cohort" / "cases.csv").read_text(encoding="utf-8")
    assert str(tmp_path) not in page
    assert str(tmp_path) not in (out / "cohort" / "cohort.json").read_text(encoding="utf-8")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    out = write_run(tmp_path / "out", dict(zip("abc", planted(3))), AFFINE)
    (tmp_path / "elsewhere").mkdir()
    (out / "cohort").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="link to another folder"):
        write_cohort(analyse(out))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "r.nii.gz"], "--transforms is missing"),
        (["--transforms", "identity"], "--space is missing"),
        (["--regions", "nothing"], "no such file"),
        (["--level", "2"], "between 0 and 1"),
        (["--region-names", "1=a"], "also give --regions"),
        (["--target", "x"], "the folder has ClassScore-lesion"),
        (["--groups", "nothing.csv"], "cannot be read"),
    ],
)
def test_wrong_options_are_named(tmp_path, capsys, words, message):
    out = write_run(tmp_path / "out", dict(zip("abc", planted(3))), AFFINE)
    assert main(["cohort", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (out / "cohort").exists()


# -- networks ----------------------------------------------------------------------------------------------------------


class MarkNetwork(torch.nn.Module):
    """Segments bright objects; a mark beside an object raises its logit more than the object itself does."""

    def __init__(self, dims: int, classify: bool) -> None:
        super().__init__()
        self.classify = classify
        conv = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
        self.near = conv(1, 1, 9, padding=4, bias=False).double().requires_grad_(False)
        self.near.weight.fill_(1.0)
        self.dims = dims

    def forward(self, x):
        mark = torch.relu(x - 2)
        logit = x - 0.5 + 3 * self.near(mark)
        both = torch.cat([torch.zeros_like(logit), logit], 1)
        return both.flatten(2).mean(2) if self.classify else both


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("classify", [False, True])
def test_cases_in_which_the_network_uses_a_mark_are_a_cluster(tmp_path, dims, classify):
    """From the network to clusters: windows and segmentation, or classification; half of the cases have the mark."""
    random = np.random.default_rng(0)
    shape = (20, 18) if dims == 2 else (16, 14, 12)
    network = MarkNetwork(dims, classify).eval()
    inferer = None if classify else SlidingWindowInferer((12,) * dims, 2, 0.25, "gaussian")
    methods = METHODS.create_all("InputXGradient")
    targets = TARGETS.create_all(["ClassScore(1)" if classify else "MultiClassMask(1)"])
    writer = ResultWriter(tmp_path / "out", methods, targets, checks=False)
    explainer = Explainer(network, inferer, on_error="record", checks=False)
    with writer.run:
        for i in range(32):
            image = torch.zeros(1, *shape, dtype=torch.float64)
            low = [3 if classify else int(random.integers(3, 5)) for _ in shape]  # classes: same place
            image[(0, *[slice(a, a + 4) for a in low])] = torch.from_numpy(random.uniform(0.8, 1.2, (4,) * dims))
            if i % 2:
                image[(0, *[a + 6 if k == 0 else a + 1 for k, a in enumerate(low)])] = 3.0
            placed = MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64)))
            writer.explain(explainer, placed, f"case{i}", methods, targets)
    table = groups_file(tmp_path, [f"case{i},{'mark' if i % 2 else 'none'}" for i in range(32)])
    cohort = analyse(tmp_path / "out", CohortOptions(groups=str(table)))
    (result,) = cohort.families
    assert result.around == ("the centre of the scan" if classify else "the centroid of the target")
    assert result.clusters.labels is not None
    number = [int(case.removeprefix("case")) % 2 for case in result.cases]
    pairs = set(zip(number, result.clusters.labels.tolist()))
    assert len(pairs) == result.clusters.number == 2
    assert not cohort.left_out
    record = json.loads((write_cohort(cohort).page.parent / "cohort.json").read_text(encoding="utf-8"))
    assert record["families"][0]["clusters"]["number"] == 2
