"""Config files as data: errors of macros name the file and the entry."""

from __future__ import annotations

from pathlib import Path

import pytest

from esegeta_monai.bundle import BundleReader
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from tests.support.cli import make_bundle

MACROS = {
    "%nowhere": "the macro %nowhere of 'extra' names no entry",
    "%$1/0": "the macro %$1/0 of 'extra' names no entry (a macro names an entry; an expression begins with $)",
    "%gone.json::a": "the macro %gone.json::a of 'extra' cannot be replaced: gone.json cannot be read: there is no",
    "%####": "the macro %#### of 'extra'",
}


@pytest.mark.parametrize("macro", MACROS)
def test_a_wrong_macro_is_named_with_its_file(
    macro: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bundle = make_bundle(tmp_path / "bundle", extra=macro)
    text = f"configs/inference.json: {MACROS[macro]}"
    with pytest.raises(UsageError) as caught:
        BundleReader(bundle)
    assert str(caught.value).startswith(text)
    for command in ("info", "overlay", "layers"):
        assert main([command, "--bundle", str(bundle)]) == 2
        assert text in capsys.readouterr().err


def test_a_macro_is_that_of_the_last_file_that_has_the_entry(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", extra="%network_def")
    (bundle / "configs" / "more.yaml").write_text("extra: '%nowhere'\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"^configs/more.yaml: the macro %nowhere of 'extra'"):
        BundleReader(bundle, ["configs/inference.json", "configs/more.yaml"])


def test_a_wrong_macro_of_the_metadata_is_named(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    file = bundle / "configs" / "metadata.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"nothing"', '"%nowhere"'), encoding="utf-8")
    with pytest.raises(UsageError, match=r"^configs/metadata.json: the macro %nowhere of '_meta_::task'"):
        BundleReader(bundle)


def test_a_wrong_macro_of_an_override_names_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^the macro %nowhere of 'amp'"):
        BundleReader(make_bundle(tmp_path / "bundle"), overrides={"amp": "%nowhere"})
