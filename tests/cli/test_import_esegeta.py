"""``esegeta-monai import-esegeta``: the overlay runs in the bundle, and nothing of the bundle runs for it."""

from __future__ import annotations

import json

from esegeta_monai.cli.main import main
from tests.bundle.test_torchesegeta import entry, write
from tests.cli.hostile import RUN
from tests.support.cli import make_bundle, make_scan


def test_the_overlay_has_the_methods_and_runs(tmp_path, capsys, monkeypatch):
    bundle = make_bundle(tmp_path / "bundle", **RUN)
    make_scan(tmp_path / "scan.nii.gz")
    file = write(
        tmp_path,
        entry("captum_Saliency", abs=False, nt_type="smoothgrad", n_samples=2),
        {**entry("torchray_excitation_backprop", layer="Conv2"), "target": 1},
        entry("captum_layer_grad_shap", layer="Conv2", attribute_to_layer_input=True),
        timeout_enabled=True,
    )
    command = ["import-esegeta", str(file), "--bundle", str(bundle), "--layer", "Conv2=model.1.submodule"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "3 methods:" in output
    assert "--inferer#roi_size" in output
    overlay = json.loads((bundle / "configs" / "explain.json").read_text(encoding="utf-8"))
    assert overlay["explain_methods"][1] == "LayerExcitationBackprop(layer='model.1.submodule')"
    assert overlay["explain_targets"] == ["MultiClassMask(1)"]
    assert overlay["explain_handler"]["time_limit"] == 60.0
    assert main(command) == 0  # the same content again
    monkeypatch.setenv("ESEGETA_TRUST", "1")
    out = tmp_path / "out"
    explained = ["explain", "--bundle", str(bundle), "--input", str(tmp_path / "scan.nii.gz"), "--output", str(out)]
    assert main([*explained, "--target", "MultiClassMask(1)", "--methods", ",".join(overlay["explain_methods"])]) == 0
    maps = sorted(p.name for p in out.rglob("*_attr.nii.gz"))
    assert len(maps) == 3


def test_errors(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle", **RUN)
    (bundle / "configs" / "explain.json").write_text("{}", encoding="utf-8")
    file = write(tmp_path, entry("captum_deep_lift"))
    for more, reason in (
        ([], "already exists"),
        (["--layer", "a"], "THEIRS=OURS"),
        (["--output", str(tmp_path / "b.json"), "--bundle", str(tmp_path)], "no folder configs"),
    ):
        assert main(["import-esegeta", str(file), "--bundle", str(bundle), *more]) == 2
        assert reason in capsys.readouterr().err
