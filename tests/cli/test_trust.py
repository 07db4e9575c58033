"""Nothing of a bundle runs before the user has trusted it, whatever the bundle contains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.bundle import trust as stores
from esegeta_monai.bundle.contents import BundleContents
from esegeta_monai.bundle.trust import TRUST_VARIABLE, TrustStore, store_path
from esegeta_monai.cli.main import COMMANDS, build_parser, main
from tests.cli import hostile
from tests.cli.hostile import BOMBS, BUILDING, HOSTILE, LOOKING, make_hostile, run_command
from tests.support.bundles import BUNDLES
from tests.support.cli import make_bundle, make_scan

FAST = ("info", "overlay", "methods", "layers", "explain")
NAMED = "esegeta-monai: error: "


@pytest.fixture(autouse=True)
def nobody_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for a user who has trusted nothing, without a terminal."""
    monkeypatch.delenv(TRUST_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    before = set(sys.path)  # monai.bundle.run, which other tests call, leaves bundles on it
    with open(os.devnull, encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield
    assert not [entry for entry in sys.path if Path(entry).name == "bundle" and entry not in before]


def run(*words: object) -> int:
    return main([str(word) for word in words])


# -- hostile bundles -------------------------------------------------------------------------------------------------


def refused(name: str, commands: tuple[str, ...], folder: Path) -> None:
    place = make_hostile(name, folder / "hostile")
    for command in commands:
        ran = run_command({**LOOKING, **BUILDING}[command], place)
        assert not ran.executed, command
        assert "Traceback" not in ran.text, command
        if name in BOMBS or name == "YAML tag":
            expected = {0, 2} if command in ("methods --json", "methods NAME", "methods", "targets", "metrics") else {2}
        else:
            expected = {3} if command in BUILDING else {0, 2} if command == "methods NAME" else {0}
        assert ran.code in expected, (command, ran.text[-500:])
        if ran.code:
            assert ran.text.count(NAMED) == 1, command
        if ran.code == 3:
            assert "is not trusted" in ran.text
            assert "--trust" in ran.text


def test_every_known_way_is_tried() -> None:
    assert len(HOSTILE) >= 30
    assert set(FAST) <= {*LOOKING, *BUILDING}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs_without_trust(name: str, tmp_path: Path) -> None:
    refused(name, FAST, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs_without_trust_by_any_command(name: str, tmp_path: Path) -> None:
    refused(name, (*LOOKING, *BUILDING), tmp_path)


@pytest.mark.parametrize("name", [name for name, (_, runs) in HOSTILE.items() if runs])
def test_what_was_refused_would_have_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above could not fail."""
    place = make_hostile(name, tmp_path / "hostile")
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert run_command(BUILDING["explain --dry-run"], place).executed


@pytest.mark.parametrize("name", ["scipy.py", "json.py", "numpy/", "sitecustomize.py"])
def test_a_file_that_hides_a_module_is_refused_although_trusted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_hostile(name, tmp_path / "hostile")
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    ran = run_command(BUILDING["layers"], place)
    assert (ran.code, ran.executed) == (2, False)
    assert f"of the bundle bundle hides the module {name.rstrip('/').removesuffix('.py')}" in ran.text.replace(
        "antigravity", "json"
    ).replace("nilearn", "scipy")
    assert "refused: " in run_command(LOOKING["info"], place).text


@pytest.mark.parametrize("name", ["pickle as model.pt", "__pycache__ not of its source", "logging.conf", "tracking"])
def test_what_never_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_hostile(name, tmp_path / "hostile")
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    ran = run_command(BUILDING["layers"], place)
    assert not ran.executed
    assert ran.code == (2 if name == "pickle as model.pt" else 0)


@pytest.mark.parametrize("name", BOMBS)
def test_a_config_that_expands_without_end_is_refused_at_once(name: str, tmp_path: Path) -> None:
    place = make_hostile(name, tmp_path / "hostile")
    began = time.monotonic()
    ran = run_command(LOOKING["info"], place)
    assert ran.code == 2
    assert time.monotonic() - began < 5
    assert any(
        word in ran.text
        for word in ("nested deeper", "expands to more", "more than 1 MiB", "no regular file", "more than 1000 macros")
    )


def test_control_characters_are_shown_not_obeyed(tmp_path: Path) -> None:
    place = make_hostile("control characters", tmp_path / "hostile")
    for command in ("info", "overlay", "layers"):
        text = run_command({**LOOKING, **BUILDING}[command], place).text
        assert not set(text) & {"\x1b", "\u202e"}
    assert r"\x1b[2K" in run_command(LOOKING["info"], place).text


def test_all_that_would_run_is_listed(tmp_path: Path) -> None:
    place = make_hostile("scripts/__init__.py", tmp_path / "hostile")
    place.write(**hostile.used("$torch.load('x', weights_only=False)"), network_def={"_target_": "scripts.net.make"})
    ran = run_command(LOOKING["info --json"], place)
    entries = {(e["file"], e["id"]): (e["kind"], e["text"]) for e in json.loads(ran.text)["runs"]}
    config = "configs/inference.json"
    assert entries[config, "network_def"] == ("component", "scripts.net.make")
    assert entries[config, "extra"][0] == "pickle"
    assert entries[config, "network"] == ("expression", "$(@extra, @network_def.to('cpu'))[1]")
    assert entries[config, "inferer"] == ("component", "SlidingWindowInferer")
    assert {file for file, _ in entries} == {config, "scripts/__init__.py", "scripts/net.py"}


def test_every_command_with_a_bundle_looks_or_asks() -> None:
    """A new command with --bundle must be in the table of hostile bundles, and ask if it builds the network."""
    options = {name: {o for a in parser._actions for o in a.option_strings} for name, parser in _parsers().items()}
    with_bundle = {name for name, known in options.items() if "--bundle" in known}
    assert {name for name in with_bundle if "--trust" in options[name]} == {c.split()[0] for c in BUILDING}
    assert {name for name in with_bundle if "--trust" not in options[name]} == {c.split()[0] for c in LOOKING}


def _parsers() -> dict[str, Any]:
    (commands,) = (a for a in build_parser()._actions if a.dest == "command" or isinstance(a.choices, dict))
    assert set(commands.choices or {}) == {command.name for command in COMMANDS}
    return dict(commands.choices or {})  # type: ignore[arg-type]


# -- asking ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = make_bundle(tmp_path / "bundle")
    (folder / "scripts").mkdir()
    (folder / "scripts" / "net.py").write_text(hostile.SIMPLE, encoding="utf-8")
    return folder


def test_trust_is_remembered_by_content(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("layers", "--bundle", bundle) == 3
    assert run("layers", "--bundle", bundle, "--trust") == 0
    assert run("layers", "--bundle", bundle) == 0
    moved = bundle.with_name("moved")
    shutil.move(bundle, moved)
    assert run("layers", "--bundle", moved) == 0
    assert store_path().stat().st_mode & 0o077 == 0
    for name in ("scripts/net.py", "configs/inference.json", "configs/metadata.json", "models/model.pt"):
        before = (moved / name).read_bytes()
        (moved / name).write_bytes(before + b" \n")
        assert run("layers", "--bundle", moved) == 3, name
        (moved / name).write_bytes(before)
        assert run("layers", "--bundle", moved) == 0
    for name in ("scripts/new.py", "other/new.py", "models/new.bin", "new.pkl"):
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_text("", encoding="utf-8")
        assert run("layers", "--bundle", moved) == 3, name
        (moved / name).unlink()
    for name in ("eval/scan_trans.nii.gz", "models/weights.safetensors", "docs/README.md", "scripts/__pycache__/a.pyc"):
        (moved / name).parent.mkdir(exist_ok=True)
        (moved / name).write_text("", encoding="utf-8")  # outputs, numbers and texts run nothing
        assert run("layers", "--bundle", moved) == 0, name
    capsys.readouterr()


def test_a_file_that_the_config_names_is_part_of_the_content(bundle: Path) -> None:
    file = bundle / "configs" / "inference.json"
    config = {
        **json.loads(file.read_text(encoding="utf-8")),
        "extra": "$exec(open(@bundle_root + '/docs/readme.txt').read())",
    }
    file.write_text(json.dumps(config), encoding="utf-8")
    (bundle / "docs").mkdir()
    (bundle / "docs" / "readme.txt").write_text("pass", encoding="utf-8")
    assert run("layers", "--bundle", bundle, "--trust") == 0
    (bundle / "docs" / "readme.txt").write_text("import os", encoding="utf-8")
    assert run("layers", "--bundle", bundle) == 3


@pytest.mark.parametrize(("value", "code"), [("1", 0), ("0", 3), ("yes", 3), ("", 3)])
def test_the_variable(bundle: Path, monkeypatch: pytest.MonkeyPatch, value: str, code: int) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, value)
    assert run("layers", "--bundle", bundle) == code
    assert not store_path().exists()  # an exception for one process is not remembered


class Terminal:
    """A terminal with one answer."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.answer


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("Yes\n", 0), ("n\n", 3), ("\n", 3), ("", 3)])
def test_the_question(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert run("layers", "--bundle", bundle) == code
    question = capsys.readouterr().err
    assert "scripts/net.py" in question
    assert "network" in question
    assert "Trust these contents?" in question
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    assert run("layers", "--bundle", bundle) == code  # a yes is asked for once
    assert ("Trust these contents?" in capsys.readouterr().err) == (code != 0)
    monkeypatch.setenv("RANK", "0")
    assert run("layers", "--bundle", bundle) == code  # several processes share a terminal: no question
    assert "Trust these contents?" not in capsys.readouterr().err


def test_large_files_are_hashed_once(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = bundle / "models" / "large.pt"
    weights.write_bytes(os.urandom(1 << 21))
    hashed: list[str] = []
    monkeypatch.setattr(stores, "sha256_file", lambda file: hashed.append(file.name) or "0" * 64)
    for _ in range(3):
        store = TrustStore()
        BundleContents(bundle).digest(store.sha256)
        store.save()
    assert hashed.count("large.pt") == 1
    assert hashed.count("inference.json") == 3
    state = weights.stat()
    weights.write_bytes(os.urandom(1 << 21))
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))  # size and time of the content as before
    BundleContents(bundle).digest(TrustStore().sha256)
    assert hashed.count("large.pt") == 2


def test_a_store_that_is_damaged_or_cannot_be_written(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    store_path().parent.mkdir(parents=True)
    for text in ("{", "[]", '{"trusted": 3}', "[" * 100_000):
        store_path().write_text(text, encoding="utf-8")
        assert run("layers", "--bundle", bundle) == 3
        assert "no bundle counts as trusted" in caplog.text
        caplog.clear()
    store_path().unlink()
    store_path().parent.rmdir()
    store_path().parent.write_text("a file in place of the folder", encoding="utf-8")
    assert run("layers", "--bundle", bundle, "--trust") == 0
    assert "is not remembered" in caplog.text


def test_our_own_bundles_are_trusted_with_their_own_configs_only(tmp_path: Path) -> None:
    shipped = BUNDLES / "brain_lesion_classification"
    assert run("layers", "--bundle", shipped) == 0
    copy = shutil.copytree(shipped, tmp_path / "bundles" / shipped.name)
    assert run("layers", "--bundle", copy) == 3
    marker = tmp_path / "marker"
    other = tmp_path / "inference.json"
    other.write_text(
        json.dumps({"network_def": {"_target_": "os.system", "command": f"touch {marker}"}}), encoding="utf-8"
    )
    assert run("layers", "--bundle", shipped, "--config", other) == 3
    assert not marker.exists()


def test_a_bundle_in_the_working_directory_is_not_that_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bundle(tmp_path / "bundles" / "brain_lesion_classification")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("esegeta_monai.__file__", str(tmp_path / "site-packages" / "esegeta_monai" / "__init__.py"))
    assert run("demo", "--output", tmp_path / "out") == 3


# -- records ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """A bundle, a scan and a finished run, and a module on the path that must not be imported."""
    folder, scan = make_bundle(tmp_path / "bundle"), make_scan(tmp_path / "s.nii.gz")
    words = ["--methods", "IntegratedGradients(n_steps=2)", "--target", "MultiClassMask(1)", "--no-pictures", "--trust"]
    assert run("explain", "--bundle", folder, "--input", scan, "--output", tmp_path / "out", *words) == 0
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "evil_module.py").write_text(
        f"import os\nos.system('touch {tmp_path / 'marker'}')\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder, scan, tmp_path / "out"


CHANGES: dict[str, dict[str, Any]] = {
    "method": {"method": "evil_module.Evil"},
    "target": {"target": "evil_module.Evil"},
    "nested method": {"parameters": {"method": {"name": "evil_module.Evil"}}},
    "nested in text": {"method": "SmoothGrad", "parameters": {"method": "evil_module.Evil()"}},
    "baseline": {"parameters": {"baseline": "evil_module.Evil"}},
    "baseline with call": {"parameters": {"baseline": "evil_module.Evil()"}},
    "target parameters": {"target_parameters": {"class_index": {"name": "evil_module.Evil"}}},
    "target of config": {"parameters": {"baseline": {"_target_": "evil_module.Evil"}}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_names_in_a_record_are_not_imported(
    explained: tuple[Path, Path, Path], tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scan, out = explained
    for file in (next(out.rglob("*_attr.json")), out / "run.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        for entry in content.get("results", [content]):
            for key, value in CHANGES[change].items():
                same = isinstance(value, dict) and isinstance(entry.get(key), dict)
                entry[key] = {**entry[key], **value} if same else value
        file.write_text(json.dumps(content), encoding="utf-8")
    where = ["--bundle", folder, "--input", scan, "--output", tmp_path / "evaluated", "--maps", out, "--no-controls"]
    for metrics in ("Sparseness", "MaxSensitivity(n_samples=1)"):
        assert run("evaluate", *where, "--metrics", metrics) in (0, 1, 2)
        assert not (tmp_path / "marker").exists()
    assert run("report", out) in (0, 1, 2)
    again = ["--methods", "Saliency", "--target", "MultiClassMask(1)", "--no-pictures"]
    assert run("explain", "--bundle", folder, "--input", scan, "--output", out, *again) == 0  # resumes
    assert not (tmp_path / "marker").exists()
    assert "evil_module" not in sys.modules


# -- processes of their own ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "how", "command"),
    [
        ("scipy.py", "module", "info"),
        ("scipy.py", "command", "layers"),
        ("numpy/", "module", "layers"),
        ("entry points", "module", "info"),
        ("entry points", "command", "layers"),
        ("sitecustomize.py", "module", "layers"),
        ("evil.pth (path file)", "module", "info"),
    ],
)
def test_the_working_directory_is_the_bundle(name: str, command: str, how: str, tmp_path: Path) -> None:
    """A new process, in which the hidden modules have not been imported yet."""
    place = make_hostile(name, tmp_path / "hostile")
    script = tmp_path / "bin" / "esegeta-monai"
    script.parent.mkdir()
    script.write_text("import sys\nfrom esegeta_monai.cli.main import main\nsys.exit(main())\n", encoding="utf-8")
    start = ["-m", "esegeta_monai"] if how == "module" else [str(script)]
    root = str(Path(stores.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, *start, command, "--bundle", "."],
        cwd=place.root, env={**os.environ, "PYTHONPATH": root}, capture_output=True, check=False,
        text=True, encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == (3 if command == "layers" else 0), done.stderr
    assert not place.marker.exists()
