"""The callback of Lightning: its maps are those of the Ignite handler, and training stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.errors import UsageError
from esegeta_monai.handlers import EvaluationHandler, ExplanationHandler
from esegeta_monai.interop import lightning as ours
from esegeta_monai.interop.lightning import ExplanationCallback
from tests.handlers.test_explanation import Small, evaluator, loader, maps, prepare, statuses
from tests.support import oblique

METHODS = ["Saliency", "GradCam(layer='first')", "Occlusion(window=4)"]


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    return [oblique.write_scan(tmp_path / "scans" / f"{name}.nii.gz", i) for i, name in enumerate(("alpha", "beta"))]


def inferer() -> SlidingWindowInferer:
    return SlidingWindowInferer((8, 8, 8), 2, 0.25, "gaussian")


def handler(output: Path | str, **options: Any) -> ExplanationHandler:
    options = {"methods": METHODS, "targets": "MultiClassMask(1)", "pictures": False, **options}
    return ExplanationHandler(output_dir=output, **options)


def lightning() -> Any:
    try:
        import lightning.pytorch as pl
    except ImportError:
        pl = pytest.importorskip("pytorch_lightning", reason='needs Lightning: pip install "esegeta-monai[lightning]"')
    return pl


def module(pl: Any) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def training_step(self, batch: Any, index: int) -> Any:
            return (self.net(batch["image"].as_tensor()) ** 2).mean() + 0.1 * torch.rand(())

        def validation_step(self, batch: Any, index: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def trainer(pl: Any, root: Path, *callbacks: Any, **options: Any) -> Any:
    more = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
    return pl.Trainer(callbacks=list(callbacks), accelerator="cpu", default_root_dir=root, **more)


def callback(*handlers: Any, **options: Any) -> ExplanationCallback:
    return ExplanationCallback(list(handlers), **{"network": "net", "inferer": inferer(), "prepare_batch": prepare,
                                                  **options})  # fmt: skip


def test_maps_are_those_of_the_ignite_handler(scans: list[Path], tmp_path: Path) -> None:
    """Two epochs of training; the handler on an evaluator with the weights of each epoch gives the same bits."""
    pl = lightning()
    torch.manual_seed(0)
    net = module(pl)
    weights: list[dict[str, torch.Tensor]] = []

    class Keep(pl.Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                weights.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})

    explain = callback(handler(str(tmp_path / "lightning" / "{epoch}")))
    trainer(pl, tmp_path, Keep(), explain, max_epochs=2).fit(net, loader(scans), loader(scans))
    assert len(weights) == 2
    for epoch, state in enumerate(weights, 1):
        network = Small()
        network.load_state_dict(state)
        engine = evaluator(scans, network)
        handler(tmp_path / "ignite" / str(epoch)).attach(engine)
        engine.run()
        expected, written = maps(tmp_path / "ignite" / str(epoch)), maps(tmp_path / "lightning" / str(epoch))
        assert set(written) == set(expected)
        assert len(written) == 6
        for name, values in expected.items():
            assert values.any()
            assert (written[name] == values).all()
        assert set(statuses(tmp_path / "lightning" / str(epoch)).values()) == {"ok"}
    first, last = (maps(tmp_path / "lightning" / str(epoch)) for epoch in (1, 2))
    assert any((first[name] != last[name]).any() for name in first)


def test_training_stays_as_it_is(scans: list[Path], tmp_path: Path) -> None:
    pl, ends = lightning(), []
    for callbacks in ([], [callback(handler(tmp_path / "maps", methods=["SmoothGrad(n_samples=2)"]))]):
        torch.manual_seed(0)
        net = module(pl)
        trainer(pl, tmp_path, *callbacks, max_epochs=2).fit(net, loader(scans), loader(scans))
        ends.append(net.net.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])
    assert maps(tmp_path / "maps")


def test_epochs_and_cases_are_the_handlers(scans: list[Path], tmp_path: Path) -> None:
    pl = lightning()
    runs: list[int] = []
    explain = callback(handler(str(tmp_path / "{epoch}"), methods=["Saliency"], epochs=2, cases=1))
    net = module(pl)
    net.net.register_forward_hook(lambda m, x, y: runs.append(len(x[0])) if not m.training else None)
    trainer(pl, tmp_path, explain, max_epochs=3).fit(net, loader(scans), loader(scans))
    assert sorted(p.parent.name for p in tmp_path.glob("*/run.json")) == ["1", "3"]
    assert [case for case, _ in statuses(tmp_path / "1")] == ["alpha"]
    before = len(runs)
    trainer(pl, tmp_path, callback(), max_epochs=1).fit(net, loader(scans), loader(scans))
    assert len(runs) == before > 0  # without handlers nothing is predicted again


def test_validation_alone_and_evaluation(scans: list[Path], tmp_path: Path) -> None:
    pl = lightning()
    judge = EvaluationHandler(
        ["Saliency"], targets="MultiClassMask(1)", output_dir=tmp_path / "out", metrics="Sparseness", controls=False
    )
    explain = callback(handler(tmp_path / "out", methods=["Saliency"]), judge)
    trainer(pl, tmp_path, explain).validate(module(pl), loader(scans), verbose=False)
    assert len(maps(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "metrics.csv").read_text(encoding="utf-8").count("Sparseness") == 2


def test_a_wrong_network_is_refused(scans: list[Path], tmp_path: Path) -> None:
    pl = lightning()
    with pytest.raises(UsageError, match="network='model' is no network of Module"):
        trainer(pl, tmp_path, callback(handler(tmp_path), network="model")).validate(module(pl), loader(scans))


def test_without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_INSTALLED", [])
    with pytest.raises(UsageError, match=r"pip install \"esegeta-monai\[lightning\]\""):
        ExplanationCallback([])
