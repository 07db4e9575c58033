"""Results in MLflow and Weights & Biases: what is logged, and to which run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.bundle.overlay import shipped_overlay
from esegeta_monai.errors import UsageError
from esegeta_monai.handlers import EvaluationHandler, tracking
from esegeta_monai.handlers.tracking import MlflowTracker, Tracker, WandbTracker, figures, tracked_files, tracker_of
from tests.handlers.test_explanation import Small, evaluator, handler, records, scans  # noqa: F401 - a fixture
from tests.support import oblique


class Recorder:
    """A client of MLflow, as far as it is used."""

    def __init__(self, broken: bool = False) -> None:
        self.artifacts: dict[str, bytes] = {}
        self.metrics: dict[str, tuple[float, int]] = {}
        self.broken = broken

    def log_artifact(self, run: str, path: str, place: str) -> None:
        if self.broken:
            raise ConnectionError("no server")
        self.artifacts[f"{run}:{place}/{Path(path).name}"] = Path(path).read_bytes()

    def log_metric(self, run: str, name: str, value: float, step: int) -> None:
        self.metrics[name] = (value, step)


def explained(scans: list[Path], output: Path, track: Any, **options: Any) -> None:  # noqa: F811
    engine = evaluator(scans, Small())
    options = {"methods": ["Saliency"], "pictures": True, "report": True, **options}
    handler(output, track=track, **options).attach(engine)
    judge = EvaluationHandler("Saliency", "MultiClassMask(1)", metrics="Sparseness", output_dir=output, controls=False)
    judge.attach(engine)
    engine.run()


def test_maps_pictures_and_figures_are_logged(scans: list[Path], tmp_path: Path) -> None:  # noqa: F811
    client = Recorder()
    explained(scans, tmp_path / "out", MlflowTracker(client, "r"))
    names = {name.split("/", 2)[2] for name in client.artifacts}
    stems = {f"{c}/{c}_MultiClassMask-class1_Saliency_attr" for c in ("alpha", "beta")}
    assert names >= {"run.json", *(s + end for s in stems for end in (".nii.gz", ".json", ".png"))}
    assert names == {p.relative_to(tmp_path / "out").as_posix() for p in tracked_files(tmp_path / "out")}
    (path,) = (tmp_path / "out").rglob("alpha*_attr.nii.gz")
    assert client.artifacts[f"r:explanations/epoch1/alpha/{path.name}"] == path.read_bytes()
    means = figures(tmp_path / "out")
    values = [record["value"] for record in records(tmp_path / "out").values()]
    assert means["explanation/maps"] == 2
    assert means["explanation/value/MultiClassMask-class1/Saliency"] == pytest.approx(sum(values) / 2)
    with open(tmp_path / "out" / "metrics.csv", encoding="utf-8") as file:
        rows = [float(row["value"]) for row in csv.DictReader(file)]
    assert means["explanation/Sparseness/MultiClassMask-class1/Saliency"] == pytest.approx(sum(rows) / 2)
    assert client.metrics["explanation/failed"] == (0.0, 1)


def test_what_shows_the_patient_is_not_logged(tmp_path: Path) -> None:
    names = ["a/a_t_M_attr.nii.gz", "a/a_scan.nii.gz", "a/a_t_mask.nii.gz", "a/a_t_M_attr.dcm", "a/a_report.html"]
    names += ["esegeta.log", "index.html", ".scores/x.json", "results.csv", "sub-1/anat/sub-1_desc-M_attr.nii.gz"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    names = [p.relative_to(tmp_path).as_posix() for p in tracked_files(tmp_path)]
    assert names == ["a/a_t_M_attr.nii.gz", "sub-1/anat/sub-1_desc-M_attr.nii.gz"]


def test_a_service_that_fails_does_not_end_the_run(
    scans: list[Path],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    explained(scans, tmp_path / "out", MlflowTracker(Recorder(broken=True), "r"))
    assert "out is not logged: MLflow refuses the results in out: ConnectionError: no server" in caplog.text
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["finished"]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Tracker):
        def log(self, folder: str | Path, epoch: int | None = None) -> None:
            pass

    assert tracker_of(None) is None
    assert isinstance(tracker_of(own := Own()), Own)
    assert tracker_of(own) is own
    with pytest.raises(UsageError, match="track='comet': give 'mlflow', 'wandb' or a Tracker"):
        tracker_of("comet")
    monkeypatch.setattr(tracking, "optional_import", lambda name: (None, False))
    for name in ("mlflow", "wandb"):
        with pytest.raises(UsageError, match=rf"pip install \"esegeta-monai\[{name}\]\""):
            tracker_of(name)


def test_mlflow_in_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--tracking mlflow`` of MONAI's bundles with a local store: the artifacts are the files."""
    mlflow = pytest.importorskip("mlflow", reason='needs MLflow: pip install "esegeta-monai[mlflow]"')
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    scan = oblique.write_scan(tmp_path / "scans" / "alpha.nii.gz", 0)
    folder = oblique.write(tmp_path / "bundle", oblique.config([scan], tmp_path))
    config = [str(folder / "configs" / "inference.json"), str(shipped_overlay())]
    options = {"explain_targets": "MultiClassMask(2)", "explain_methods": "Saliency"}
    options["explain_output_dir"] = str(tmp_path / "maps")
    monai.bundle.run(
        config_file=config, bundle_root=str(folder), tracking="mlflow", **{"explain_handler#track": "mlflow"}, **options
    )
    (store,) = tmp_path.rglob("mlruns.db")
    client = mlflow.MlflowClient(f"sqlite:///{store}")
    (run,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    paths = [p for p in (tmp_path / "maps").rglob("*_attr.nii.gz")]
    assert paths
    for path in paths:
        place = f"explanations/epoch1/{path.relative_to(tmp_path / 'maps').as_posix()}"
        copy = client.download_artifacts(run.info.run_id, place, str(tmp_path))
        np.testing.assert_array_equal(nib.load(copy).get_fdata(), nib.load(path).get_fdata())
    assert run.data.metrics["explanation/maps"] == len(paths)
    assert run.info.status == "FINISHED"


def test_mlflow_needs_a_run(scans: list[Path], tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("mlflow", reason='needs MLflow: pip install "esegeta-monai[mlflow]"')
    with pytest.raises(UsageError, match="there is no run: add --tracking mlflow"):
        explained(scans, tmp_path / "out", "mlflow")


def test_wandb_offline(scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    wandb = pytest.importorskip("wandb", reason='needs Weights & Biases: pip install "esegeta-monai[wandb]"')
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(UsageError, match=r"there is no run: call wandb\.init"):
        WandbTracker().begin(None)
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    seen: list[Any] = []
    log, log_artifact = run.log, run.log_artifact
    monkeypatch.setattr(run, "log", lambda values: (seen.append(values), log(values)))
    monkeypatch.setattr(run, "log_artifact", lambda artifact: (seen.append(artifact), log_artifact(artifact)))
    explained(scans, tmp_path / "out", "wandb")
    run.finish()
    values, artifact = seen
    files = {p.relative_to(tmp_path / "out").as_posix() for p in tracked_files(tmp_path / "out")}
    assert set(artifact.manifest.entries) == files
    assert values["explanation/maps"] == 2
    assert values["epoch"] == 1
    assert isinstance(values["explanation/alpha_MultiClassMask-class1_Saliency_attr"], wandb.Image)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
