"""The package as built and shipped: the wheel outside the checkout, and loading that cannot run code."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support import oblique

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "esegeta_monai"


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """Calls of a function by its full name."""
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def imported_from(tree: ast.AST, module: str) -> set[str]:
    """Names that ``from module import …`` brings."""
    result = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == module]
    return {alias.name for node in result for alias in node.names}


def test_no_checkpoint_is_loaded_with_code_in_it() -> None:
    """Every torch.load of the package, the bundles and the benchmarks passes weights_only=True."""
    files = [p for folder in ("esegeta_monai", "bundles", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    result, unsafe = 0, []
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert "load" not in imported_from(tree, "torch"), file
        for call in calls(tree, "torch.load"):
            result += 1
            safe = [k for k in call.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            if not safe:
                unsafe.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert unsafe == []
    assert result > 0  # else the check looks at nothing


@pytest.mark.parametrize("name", ["pickle.load", "pickle.loads", "eval", "exec", "os.system"])
def test_nothing_that_runs_foreign_code(name: str) -> None:
    unsafe = [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for file in PACKAGE.rglob("*.py")
        for call in calls(ast.parse(file.read_text(encoding="utf-8")), name)
    ]
    assert unsafe == []


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist")], source)
    (wheel,) = (folder / "dist").glob("*.whl")
    target = folder / "site"
    with zipfile.ZipFile(wheel) as archive:  # what pip does with a pure wheel, whether or not pip is there
        archive.extractall(target)
    shutil.rmtree(source)
    return target


def run(command: list[str], where: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in another folder, where the only esegeta_monai is the installed one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.mark.slow
class TestWheel:
    def test_it_is_what_is_imported(self, installed: Path, tmp_path: Path) -> None:
        code = "import esegeta_monai; print(esegeta_monai.__file__)"
        done = run([sys.executable, "-c", code], tmp_path, installed)
        assert Path(done.stdout.strip()).is_relative_to(installed)

    def test_it_has_every_module_and_the_package_data(self, installed: Path) -> None:
        built = {p.relative_to(installed).as_posix() for p in (installed / "esegeta_monai").rglob("*") if p.is_file()}
        data = (".json", ".typed", ".html", ".css", ".js")
        sources = {
            p.relative_to(ROOT).as_posix()
            for p in PACKAGE.rglob("*")
            if p.suffix in (".py", *data) or p.name == "py.typed"
        }
        assert {"esegeta_monai/bundle/explain.json", "esegeta_monai/py.typed"} <= built
        assert sources - built == set()

    def test_its_metadata(self, installed: Path) -> None:
        (info,) = installed.glob("*.dist-info")
        metadata = (info / "METADATA").read_text(encoding="utf-8")
        assert "License-Expression: Apache-2.0" in metadata
        assert (info / "licenses" / "LICENSE").is_file()
        assert "esegeta-monai = esegeta_monai.cli.main:main" in (info / "entry_points.txt").read_text(encoding="utf-8")

    @pytest.mark.parametrize(("command", "expected"), [("methods", "Saliency"), ("targets", "MultiClassMask")])
    def test_the_command_line(self, installed: Path, tmp_path: Path, command: str, expected: str) -> None:
        done = run([sys.executable, "-m", "esegeta_monai", command], tmp_path, installed)
        assert expected in done.stdout

    def test_explain_by_command_and_by_overlay(self, installed: Path, tmp_path: Path) -> None:
        """Both interfaces on the same bundle, from outside the checkout."""
        scan = oblique.write_scan(tmp_path / "scans" / "alpha.nii.gz")
        bundle = oblique.write(tmp_path / "bundle", oblique.config([scan], tmp_path / "eval"))
        python = [sys.executable, "-m"]
        run(
            [*python, "esegeta_monai", "explain", "--bundle", str(bundle), "--input", str(scan),
             "--methods", "Saliency", "--target", "MultiClassMask(class_index=core)",
             "--output", str(tmp_path / "cli")],
            tmp_path, installed,
        )  # fmt: skip
        run([*python, "esegeta_monai", "overlay", "--bundle", str(bundle)], tmp_path, installed)
        run(
            [*python, "monai.bundle", "run", "--config_file", "['configs/inference.json','configs/explain.json']",
             "--explain_methods", "Saliency", "--explain_targets", "MultiClassMask(class_index='core')",
             "--explain_output_dir", str(tmp_path / "overlay")],
            bundle, installed,
        )  # fmt: skip
        for door in ("cli", "overlay"):
            assert len(list((tmp_path / door).rglob("alpha_MultiClassMask-core_Saliency_attr.nii.gz"))) == 1, door
