"""A perturbation run that was stopped goes on where it was: by its time limit, by Ctrl-C, by kill -9."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai import methods as m
from esegeta_monai.engine.perturbation import batching
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.targets import Box, MultiClassMask
from tests.support.networks import small
from tests.support.tensors import assert_equal, noise

METHODS = [
    m.Occlusion(3, 2),
    m.Occlusion(3, per_channel=True),
    m.FeatureAblation("grid(3)"),
    m.KernelShap(40, "grid(6)"),
    m.Lime(40, "grid(6)"),
    m.Rise(30, grid=2),
    m.Sobol(4, grid=3),
    m.Hsic(16, grid=2),
]
IMAGE = noise(1, 2, 6, 20)


class Stops(nn.Module):
    """A network that is interrupted after a number of passes."""

    def __init__(self, after: float) -> None:
        super().__init__()
        self.inner, self.left, self.error = small(2, 2), after, KeyboardInterrupt

    def forward(self, x: Tensor) -> Tensor:
        self.left -= len(x)
        if self.left < 0:
            raise self.error
        return self.inner(x)


def explain(network: nn.Module, method: m.Method, folder: Path | None, output: str = "logit", image: Tensor = IMAGE):
    explainer = Explainer(
        network, SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"), window_batch=2, checks=False, local=False
    )
    target = MultiClassMask(1, output=output)
    (attribution,) = explainer(image, [method], [target], scores_dir=folder)
    return attribution


def tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are written after every batch, and for non-linear targets after every few perturbations."""
    monkeypatch.setattr(ScoreCheckpoint.__init__, "__defaults__", (0.0,))
    monkeypatch.setattr(batching, "CHUNK", 3)


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("method", METHODS, ids=lambda x: f"{x.name}{len(repr(x))}")
def test_an_interrupted_run_goes_on(method, output, tmp_path, often):
    whole = explain(Stops(np.inf), method, None, output)
    network = Stops(8 + whole.record["window_passes"] * 2 // 3)  # 8 more for prediction and comparison
    with pytest.raises(KeyboardInterrupt):
        explain(network, method, tmp_path / "scores", output)
    assert len(tables(tmp_path / "scores")) == 1
    network.left = np.inf
    resumed = explain(network, method, tmp_path / "scores", output)
    assert_equal(torch.as_tensor(resumed.map), torch.as_tensor(whole.map), 1e-12)
    assert resumed.record["window_passes"] < 0.75 * whole.record["window_passes"]
    assert tables(tmp_path / "scores") == []


def test_the_time_limit_keeps_the_scores(tmp_path, monkeypatch):
    method = m.Occlusion(3, 2)
    whole = explain(small(2, 2), method, None)
    clock = iter(np.arange(0.0, 1e6, 1.0))
    monkeypatch.setattr("esegeta_monai.engine.progress.time.monotonic", lambda: float(next(clock)))
    explainer = Explainer(
        small(2, 2),
        SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"),
        window_batch=2,
        time_limit=12.0,
        on_error="record",
    )
    runs = []
    while not runs or runs[-1].status == "timeout":
        (attribution,) = explainer(IMAGE, [method], [MultiClassMask(1)], scores_dir=tmp_path)
        runs.append(attribution)
        assert len(runs) < 10
    assert len(runs) > 2
    assert all("time limit" in r.record["reason"] for r in runs[:-1])
    assert all(r.record["reason"].endswith("the same run continues from them") for r in runs[:-1])
    assert_equal(torch.as_tensor(runs[-1].map), torch.as_tensor(whole.map), 1e-12)
    again = sum(r.record["window_passes"] for r in runs) - whole.record["window_passes"]
    assert 0 <= again < len(runs)  # the window that each goes on in, as it is


@pytest.mark.parametrize("damage", ["cut", "text", "foreign", "shape"])
def test_a_table_that_cannot_be_right_is_named_and_not_used(damage, tmp_path, often, caplog):
    method, folder = m.Occlusion(3, 2), tmp_path / "scores"
    whole = explain(Stops(np.inf), method, None)
    network = Stops(60)
    with pytest.raises(KeyboardInterrupt):
        explain(network, method, folder)
    (path,) = tables(folder)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("not a table", encoding="utf-8")
    else:
        with np.load(path) as file:
            parts = dict(file)
        parts.update({"key": np.array("{}")} if damage == "foreign" else {"scores": parts["scores"][:, :2]})
        with open(path, "wb") as file:
            np.savez(file, **parts)
    network.left = np.inf
    with caplog.at_level(logging.WARNING):
        again = explain(network, method, folder)
    assert path.name in caplog.text
    assert "computed again" in caplog.text
    assert again.record["window_passes"] == whole.record["window_passes"]
    assert torch.equal(torch.as_tensor(again.map), torch.as_tensor(whole.map))
    assert tables(folder) == []


def test_other_weights_image_or_parameters_have_tables_of_their_own(tmp_path, often):
    whole = explain(Stops(np.inf), m.Occlusion(3, 2), None).record["window_passes"]

    def interrupted(network: Stops, method: m.Method, image: Tensor = IMAGE) -> None:
        with pytest.raises(KeyboardInterrupt):
            explain(network, method, tmp_path, image=image)

    interrupted(Stops(60), m.Occlusion(3, 2))
    interrupted(Stops(60), m.Occlusion(3, 2, baseline=0.5))
    interrupted(Stops(60), m.Occlusion(3, 2), IMAGE + 1)
    other = Stops(60)
    with torch.no_grad():
        other.inner.b.bias += 1e-6
    interrupted(other, m.Occlusion(3, 2))
    assert len(tables(tmp_path)) == 4
    assert explain(Stops(np.inf), m.Occlusion(3, 2), tmp_path).record["window_passes"] < whole
    assert len(tables(tmp_path)) == 3


KILLED = """
import sys, time, torch
from pathlib import Path
from esegeta_monai import methods as m
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from tests.engine.perturbation.test_checkpoint import Stops, explain
ScoreCheckpoint.__init__.__defaults__ = (0.0,)
class Slow(Stops):
    def forward(self, x):
        time.sleep(0.05)
        return super().forward(x)
found = explain(Slow(1e9), m.Occlusion(3, 2), Path(sys.argv[1]))
print(found.record["window_passes"])
torch.save(found.map.as_tensor(), sys.argv[2])
"""


@pytest.mark.slow
def test_kill_9_in_the_middle(tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path / "scores"), str(tmp_path / "map.pt")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    first = subprocess.Popen(words, env=env, stdout=subprocess.PIPE)
    until = time.monotonic() + 200
    while not any(p.suffix == ".npz" and not p.name.startswith(".tmp-") for p in tables(tmp_path / "scores")):
        assert first.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not (tmp_path / "map.pt").exists()
    second = subprocess.run(words, env=env, capture_output=True, text=True, encoding="utf-8", check=True)
    whole = explain(Stops(1e9), m.Occlusion(3, 2), None)
    assert int(second.stdout) < whole.record["window_passes"]
    assert_equal(torch.load(tmp_path / "map.pt"), torch.as_tensor(whole.map), 1e-12)


class Conditioned(nn.Module):
    """Stops, with a condition volume added to the image."""

    def __init__(self, after: float) -> None:
        super().__init__()
        self.stops = Stops(after)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.stops(x + condition)


def test_another_condition_has_a_table_of_its_own(tmp_path, often):
    """The image, and the mask of the target, are the same; the scores are not."""

    def run(network: nn.Module, condition: Tensor, folder: Path | None):
        explainer = Explainer(
            network, SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"), window_batch=2, checks=False, local=False
        )
        kwargs = {"condition": condition}
        (attribution,) = explainer(
            IMAGE, [m.Occlusion(3, 2)], [Box(1, (0, 0), (6, 20))], network_kwargs=kwargs, scores_dir=folder
        )
        return attribution

    first, second = torch.zeros_like(IMAGE), noise(*IMAGE.shape, seed=9)
    with pytest.raises(KeyboardInterrupt):
        run(Conditioned(60), first, tmp_path)
    assert len(tables(tmp_path)) == 1
    whole = run(Conditioned(np.inf), second, None)
    again = run(Conditioned(np.inf), second, tmp_path)
    assert_equal(torch.as_tensor(again.map), torch.as_tensor(whole.map), 1e-12)
    assert again.record["window_passes"] == whole.record["window_passes"]


def test_the_scores_are_there_until_the_map_is_taken(tmp_path, often):
    """Scores survive a run that is killed while a map is written."""
    explainer = Explainer(small(2, 2), SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"), window_batch=2)
    for attribution in explainer(IMAGE, [m.Occlusion(3, 2)], [MultiClassMask(1)], scores_dir=tmp_path):
        assert attribution.status == "ok"
        assert len(tables(tmp_path)) == 1
    assert tables(tmp_path) == []


WRAPPERS = [m.SmoothGrad, m.SmoothGradSquared, m.VarGrad]
CONSTANTS = [0.0, "zero", "constant(value=0.5)"]


@pytest.mark.parametrize("baseline", CONSTANTS, ids=str)
@pytest.mark.parametrize("inner", METHODS, ids=lambda x: f"{x.name}{len(repr(x))}")
@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda x: x.__name__)
def test_a_method_inside_a_method_never_reads_the_scores_of_another_image(wrapper, inner, baseline, tmp_path, often):
    """With a constant baseline, the perturbations of two noisy copies differ in nothing but the image."""
    parameters = {n: v for n, v in inner.parameters.items() if n != "name"}
    method = wrapper(type(inner)(**{**parameters, "baseline": baseline}), n_samples=3, std=1.0)
    whole = explain(Stops(np.inf), method, None)
    stored = explain(Stops(np.inf), method, tmp_path / "scores")
    assert torch.equal(torch.as_tensor(stored.map), torch.as_tensor(whole.map))
    assert stored.record["window_passes"] == whole.record["window_passes"]
    assert tables(tmp_path / "scores") == []


def test_an_interrupted_run_of_noisy_images_goes_on(tmp_path, often):
    method = m.SmoothGrad(m.Occlusion(3, 2, baseline=0.0), n_samples=3, std=1.0)
    whole = explain(Stops(np.inf), method, None)
    network = Stops(8 + whole.record["window_passes"] * 2 // 3)
    with pytest.raises(KeyboardInterrupt):
        explain(network, method, tmp_path / "scores")
    assert len(tables(tmp_path / "scores")) == 2
    network.left = np.inf
    resumed = explain(network, method, tmp_path / "scores")
    assert_equal(torch.as_tensor(resumed.map), torch.as_tensor(whole.map), 1e-12)
    assert resumed.record["window_passes"] < 0.75 * whole.record["window_passes"]
    assert tables(tmp_path / "scores") == []
