"""The worker process: its results are those of the command line, it can be cancelled, and it is replaced if it dies."""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("starlette", reason="the extra app is not installed: pip install starlette uvicorn httpx")

from esegeta_monai.cli.main import main
from tests.app.running import HOSTILE, finished, started, wait_for

pytestmark = pytest.mark.slow  # starts processes that import torch

VOXEL = "Voxel(class_index=1, world=[14.0, 16.0, 14.0], name='Voxel-x')"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
    with started(tmp_path_factory.mktemp("app")) as app:
        yield app
    patch.undo()


def number(app: Any, name: str) -> int:
    return int(app.worker.opened["cases"].index(name))


def explained(app: Any, **more: Any) -> dict[str, Any]:
    job = finished(app, {"do": "explain", "case": number(app, "a"), "target": VOXEL, "methods": ["Saliency"], **more})
    assert job.state == "done", job.error
    return job.result


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("InputXGradient", VOXEL),
        ("GradCam", "Component(class_index=1, name='Component-x')"),
        ("Occlusion(window=8, name='Occlusion-8')", VOXEL),
        ("Saliency", f"Contrast({VOXEL}, others=2, name='Contrast-x')"),
        (
            "IntegratedGradients(n_steps=4, name='IG-4')",
            "MultiClassMask(1, output='probability', name='p')",
        ),
        ("ConceptRelevance(layer='model.0.conv', channels=1, name='channel-1')", VOXEL),
        ("NeuronConductance(layer='model.0.conv', channel=1, n_steps=4, name='channel-1')", VOXEL),
        ("InputXGradient", "LayerNeuron(layer='model.0.conv', channel=2, index=[7, 8, 7], name='unit')"),
    ],
)
def test_a_map_is_bit_for_bit_that_of_the_command(app: Any, tmp_path: Path, method: str, target: str) -> None:
    result = explained(app, methods=[method], target=target)
    (entry,) = result["results"]
    assert entry["status"] in ("ok", "incomplete")
    ours = app.output / entry["map"]
    words = shlex.split(result["command"])
    assert words[0] == "esegeta-monai"
    words[words.index("--output") + 1] = str(tmp_path / "out")
    assert main([*words[1:], "--quiet", "--trust"]) == 0
    of_command = tmp_path / "out" / entry["map"]
    assert ours.read_bytes() != b""
    assert np.array_equal(np.asarray(nib.load(ours).dataobj), np.asarray(nib.load(of_command).dataobj))
    assert np.abs(nib.load(ours).get_fdata()).max() > 0
    here, there = (
        json.loads(p.with_name(p.name.replace(".nii.gz", ".json")).read_text(encoding="utf-8"))
        for p in (ours, of_command)
    )
    for key in ("value", "status", "target", "parameters", "image_sha256", "weights_sha256", "window_passes"):
        assert here.get(key) == there.get(key), key


def test_the_python_text_gives_the_same_map(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = explained(app, methods=["InputXGradient"])
    space: dict[str, Any] = {}
    exec(result["python"] + "    kept = attribution\n", space)
    ours = nib.load(app.output / result["results"][0]["map"]).get_fdata(dtype=np.float32)
    of_command = space["kept"].map.numpy()[0]
    assert np.array_equal(ours.squeeze(), of_command.astype(np.float32))  # the tiny bundle keeps the scan's grid


def test_a_box_changes_the_score_by_what_two_predictions_differ(app: Any) -> None:
    """An independent computation: the image with the box set to zero, predicted by the bundle's own inferer."""
    corners = [[8.0, 8.0, 8.0], [18.0, 18.0, 18.0]]
    result = explained(app, methods=[], box=corners, baseline="zero")
    import torch

    from esegeta_monai.bundle import BundleReader

    reader = BundleReader(app.worker.first["arguments"]["bundle"])
    (file,) = [f for f in Path(app.worker.first["arguments"]["input"][0]).iterdir() if f.name == "a.nii.gz"]
    image = reader.preprocessing({"image": str(file)})["image"][None].as_tensor()
    with torch.no_grad():
        before = reader.inferer(image, reader.network.eval())[0, 1, 7, 8, 7]
        image[..., 4:10, 4:10, 4:10] = 0
        after = reader.inferer(image, reader.network.eval())[0, 1, 7, 8, 7]
    assert result["box"]["before"] == pytest.approx(float(before), rel=1e-5)
    assert result["box"]["change"] == pytest.approx(float(after - before), rel=1e-4)
    assert abs(result["box"]["change"]) > 1e-4


def test_layers_and_channels_are_what_the_network_gives(app: Any) -> None:
    import torch

    from esegeta_monai.bundle import BundleReader

    job = finished(app, {"do": "layers", "case": number(app, "a")})
    assert job.state == "done", job.error
    rows = {row["name"]: row for row in job.result["layers"]}
    assert rows["model.0.conv"]["shape"] == [4, 8, 8, 8]
    assert rows["model.0.conv"]["main"]
    asked = {
        **{"do": "channels", "case": number(app, "a"), "layer": "model.0.conv", "world": [14.0, 16.0, 14.0]},
        **{"plane": {"through": 2, "across": 0, "up": 1, "mirrored": True}, "order": "activation", "target": VOXEL},
    }
    pictures = finished(app, asked).result
    reader = BundleReader(app.worker.first["arguments"]["bundle"])
    (file,) = [f for f in Path(app.worker.first["arguments"]["input"][0]).iterdir() if f.name == "a.nii.gz"]
    image = reader.preprocessing({"image": str(file)})["image"][None].as_tensor()  # 16 x 20 x 16, windows of 16
    network, outputs = reader.network.eval(), []
    network.model[0].conv.register_forward_hook(lambda _, __, out: outputs.append(out))
    starts = [0, 4]
    with torch.no_grad():
        for start in starts:
            network(image[..., start : start + 16, :])
    start = min(starts, key=lambda s: abs(8.5 - (s + 8)))
    expected = outputs[starts.index(start)][0]
    by_strength = expected.flatten(1).abs().mean(1).argsort(descending=True).tolist()
    assert [entry["channel"] for entry in pictures["channels"]] == by_strength
    assert (pictures["width"], pictures["height"], pictures["total"]) == (8, 8, 4)
    for entry in pictures["channels"]:
        picture = expected[entry["channel"], :, :, 7 // 2].T.flip(0, 1).numpy()
        grey = np.frombuffer(base64.b64decode(entry["grey"]), np.uint8).reshape(8, 8)
        spread = entry["high"] - entry["low"]
        assert np.abs(entry["low"] + spread * grey / 255 - picture).max() <= spread / 255
    assert pictures["at"] == [7 - (8 - start) // 2, 7 - 7 // 2]
    ranked = finished(app, {**asked, "order": "relevance"}).result["channels"]
    shares = [entry["share"] for entry in ranked]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-6)
    none = finished(app, {**asked, "layer": "nowhere"})
    assert (none.state, "has no layer" in none.error) == ("failed", True)


def test_it_says_what_the_network_predicts_at_a_place(app: Any) -> None:
    job = finished(app, {"do": "look", "case": number(app, "a"), "world": [14.0, 16.0, 14.0]})
    assert job.result["voxel"] == [7, 8, 7]
    assert sum(s["probability"] for s in job.result["scores"]) == pytest.approx(1, abs=1e-5)
    outputs = [s["output"] for s in job.result["scores"]]
    assert outputs == sorted(outputs, reverse=True)
    outside = finished(app, {"do": "look", "case": number(app, "a"), "world": [140.0, 16.0, 14.0]})
    assert (outside.state, outside.error) == ("failed", "this place is outside the image that the network reads")


def test_the_cost_is_known_before_a_job(app: Any) -> None:
    job = finished(app, {"do": "costs", "case": number(app, "a"), "target": VOXEL, "methods": ["Saliency"]})
    (cost,) = job.result["costs"]
    done = explained(app)
    record = json.loads(
        (app.output / done["results"][0]["map"].replace(".nii.gz", ".json")).read_text(encoding="utf-8")
    )
    assert cost["passes"] == record["window_passes"] > 0
    costly = finished(
        app, {"do": "costs", "case": number(app, "a"), "target": VOXEL, "methods": ["Occlusion(window=1, stride=1)"]}
    )
    assert costly.result["costs"][0]["passes"] > 1000


def long_job(app: Any) -> Any:
    methods = ["SmoothGrad(n_samples=20009)"]
    request = {"do": "explain", "case": number(app, "a"), "target": VOXEL, "methods": methods}
    job = app.worker.submit({**request, "costly": True})
    wait_for(lambda: job.done > 4)
    return job


def test_a_job_is_cancelled_and_the_worker_goes_on(app: Any) -> None:
    pid, restarts = app.worker.pid, app.worker.restarts
    job = long_job(app)
    assert app.worker.cancel(job.id)
    assert job.finished.wait(60)
    assert (job.state, job.error) == ("cancelled", "cancelled; finished maps are kept")
    assert not app.worker.cancel(job.id)
    waiting, behind = long_job(app), app.worker.submit({"do": "report"})
    assert app.worker.cancel(behind.id)
    assert behind.state == "cancelled"
    app.worker.cancel(waiting.id)
    assert waiting.finished.wait(60)
    before = explained(app)["results"]
    assert before[0]["status"] in ("ok", "skipped")
    assert (app.worker.pid, app.worker.restarts) == (pid, restarts)


def test_a_method_ends_at_the_time_limit(app: Any) -> None:
    methods = ["SmoothGrad(n_samples=20008)"]
    result = explained(app, methods=methods, costly=True, time_limit=1)
    assert result["results"][0]["status"] == "timeout"


def test_a_killed_worker_is_replaced_and_said(app: Any) -> None:
    events: list[dict[str, Any]] = []
    app.worker.changed = events.append
    pid, job = app.worker.pid, long_job(app)
    os.kill(pid, signal.SIGKILL)
    assert job.finished.wait(60)
    assert job.state == "failed"
    assert "signal 9" in job.error
    assert "started again" in job.error
    assert explained(app)["results"][0]["status"] in ("ok", "skipped")
    assert app.worker.pid != pid
    assert any(e["event"] == "restarted" for e in events)
    idle = app.worker.pid
    os.kill(idle, signal.SIGKILL)  # while nothing runs
    wait_for(lambda: app.worker.pid not in (idle, None))


def test_a_worker_that_does_not_stop_is_ended(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esegeta_monai.app.process.GRACE", 0.5)
    job = long_job(app)
    os.kill(app.worker.pid, signal.SIGSTOP)
    app.worker.cancel(job.id)
    assert job.finished.wait(60)
    assert job.state == "cancelled"
    assert "did not stop by itself" in job.error


def test_hostile_names_stay_text(app: Any) -> None:
    case = number(app, HOSTILE)
    loaded = finished(app, {"do": "load", "case": case}).result
    html = app.views.make(HOSTILE, loaded, None)["html"]
    assert "<img" not in html


def test_the_worker_ends_with_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    with started(tmp_path) as app:
        process = app.worker._process
        process.stdin.close()  # as the end of the server does
        assert process.wait(30) == 0


def test_an_untrusted_bundle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.delenv("ESEGETA_TRUST", raising=False)
    with pytest.raises(AssertionError, match="is not trusted"), started(tmp_path, trusted=False):
        raise RuntimeError("not reached")
