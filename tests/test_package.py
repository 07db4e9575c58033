"""The package as built and shipped: the wheel outside the checkout, and loading that cannot run code."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.utils.files import VERSION
from tests.support import oblique

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "esegeta_monai"
BUNDLE = "bundles/brain_lesion_classification"


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


def read_project() -> dict[str, Any]:
    """The table ``[project]``; Python 3.10 has no reader, but pytest brings one."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_one_version_everywhere() -> None:
    version = read_project()["version"]
    assert version == VERSION
    assert re.findall(r"(?m)^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8")) == [version]
    assert f'set version = "{version}"' in (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8")
    heading = re.search(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert heading is not None
    assert heading[1] in (version, "Unreleased")


def test_what_is_imported_is_declared() -> None:
    """Every package that the sources import, also inside functions, is a dependency or an extra."""
    names = {"nibabel", "yaml", "sklearn", "skimage", "ignite"}
    distributions = {
        **{"yaml": "pyyaml", "sklearn": "scikit-learn", "skimage": "scikit-image", "ignite": "pytorch-ignite"},
        **{"PIL": "pillow", "lucent": "torch-lucent"},
    }
    optional = {"isal", "cupy", "torchvision"}  # used where they are installed
    project = read_project()
    declared = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    known = {re.split(r"[<>=\[ ]", text)[0].lower().replace("_", "-") for text in declared}
    imported = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    assert names <= imported  # else the check looks at nothing
    imported -= {*sys.stdlib_module_names, "esegeta_monai", *optional}
    missing = {name for name in imported if distributions.get(name, name).replace("_", "-") not in known}
    assert missing == set()


def test_lower_bounds_are_those_that_are_tested() -> None:
    """pyproject.toml, the constraints of `make test-lowest` and the conda recipe name the same versions."""
    lowest = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")))
    recipe = dict(
        re.findall(r"(?m)^    - ([\w-]+) >=(\S+)", (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8"))
    )
    conda = {"torch": "pytorch", "pytorch-ignite": "ignite", "matplotlib": "matplotlib-base"}
    bounds = dict(text.split(">=") for text in read_project()["dependencies"])
    assert bounds.keys() == lowest.keys()
    for name, bound in bounds.items():
        assert recipe[conda.get(name, name)] == bound, name
        assert lowest[name] == bound or lowest[name].startswith(f"{bound}."), name


@pytest.mark.parametrize("home", [None, "https://git.example/team/esegeta"])
def test_links_of_the_description_lead_outside_of_the_repository(home: str | None, tmp_path: Path) -> None:
    """PyPI shows README.md without the repository: its links are absolute, or plain text where the home is unknown."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GITHUB_")}
    if home is not None:
        server, _, repository = home.rpartition("/team/")
        environment |= {"GITHUB_SERVER_URL": server, "GITHUB_REPOSITORY": f"team/{repository}", "GITHUB_REF_NAME": "v9"}
    code = "import setuptools; setuptools.setup = lambda **k: print(k['long_description']); import setup"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    links = re.findall(r"\]\(([^)\s]+)\)", done.stdout)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert any(link == f"{home}/blob/v9/LICENSE" for link in links) == (home is not None)
    assert "](docs/" in (ROOT / "README.md").read_text(encoding="utf-8")  # else there is nothing to change


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked by pip into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (PACKAGE.name, BUNDLE):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "eval"))
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
    done = subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False
    )
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

    def test_the_demonstration_bundle_is_inside_and_trusted(self, installed: Path, tmp_path: Path) -> None:
        code = (
            "from esegeta_monai.cli.demo import find_bundle; from esegeta_monai.bundle.trust import is_shipped; "
            "from esegeta_monai.bundle.contents import BundleContents; b = find_bundle(); "
            "print(b); print(is_shipped(BundleContents(b))); print(is_shipped(BundleContents('copy')))"
        )
        shutil.copytree(installed / "esegeta_monai" / BUNDLE, tmp_path / "copy")
        lines = run([sys.executable, "-c", code], tmp_path, installed).stdout.splitlines()
        assert lines == [str(installed / "esegeta_monai" / BUNDLE), "True", "False"]
        ours = ROOT / BUNDLE
        files = {p.relative_to(ours) for p in ours.rglob("*") if p.is_file()}
        for file in (f for f in files if not {"__pycache__", "eval"} & set(f.parts)):
            assert (ours / file).read_bytes() == (installed / "esegeta_monai" / BUNDLE / file).read_bytes(), file

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
