"""The examples of the documentation run, check themselves, and are in their pages verbatim.

A page includes a file between ``<!-- include: PATH -->``, the path relative to the page, and ``<!-- /include -->``;
``python -m tests.docs.test_examples`` writes these parts of all pages anew.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from esegeta_monai.engine.rules import RULES

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
MADE = ("_generated", "_build")  # by Sphinx, from the other pages
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")),
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if not set(MADE) & set(page.parts)),
]
INCLUDE = re.compile(r"<!-- include: (\S+) -->\n(.*?)<!-- /include -->", re.DOTALL)
EXAMPLE_PAGES = {
    "gradient_method": "howto/gradient_method.md",
    "perturbation_method": "howto/perturbation_method.md",
    "metric": "howto/metric.md",
    "target": "howto/target.md",
    "backward_rule": "howto/backward_rule.md",
    "shared_passes": "requests.md",
}
PUBLIC = {
    "esegeta_monai",
    *(f"esegeta_monai.{package}" for package in ("methods", "metrics", "targets", "engine.rules")),
}
BROKEN = [
    ("gradient_method", "(image - mean) *", "image *"),
    ("perturbation_method", "min(i + self.thickness, n)", "min(i + self.thickness, n) - 1"),
    ("metric", "weights.new_tensor(subject.spacing)", "1.0"),
    ("target", "values[-1]", "values[-2]"),
    ("backward_rule", "x.sign() * per_size", "per_size"),
    ("shared_passes", "weights.clamp(min=0))", "weights)"),
]


def included(page: Path) -> Iterator[tuple[Path, str]]:
    """The files that a page includes, and their text in the page."""
    for path, text in INCLUDE.findall(page.read_text(encoding="utf-8")):
        yield (page.parent / path).resolve(), text


def as_code(source: str) -> str:
    """A Python file as a page includes it."""
    return f"```python\n{source.rstrip()}\n```\n"


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The rule that an example registers is gone after the test."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("name", EXAMPLE_PAGES)
def test_an_example_runs_and_prints_its_result(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(r"\d\.\d", capsys.readouterr().out)


@pytest.mark.parametrize(("name", "right", "wrong"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_the_check_of_an_example_fails_where_the_example_is_wrong(
    name: str, right: str, wrong: str, tmp_path: Path
) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    (tmp_path / "broken.py").write_text(source.replace(right, wrong), encoding="utf-8")
    with pytest.raises(AssertionError):
        runpy.run_path(str(tmp_path / "broken.py"), run_name="__main__")


@pytest.mark.parametrize("name", EXAMPLE_PAGES)
def test_an_example_is_small_and_uses_public_imports_only(name: str) -> None:
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 10))
    assert len(source.splitlines()) <= 60
    modules = [node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    ours = {m for m in modules if m is not None and m.startswith("esegeta_monai")}
    assert ours
    assert ours <= PUBLIC


@pytest.mark.parametrize("name", EXAMPLE_PAGES)
def test_an_example_stands_in_its_page(name: str) -> None:
    assert (EXAMPLES / f"{name}.py") in dict(included(ROOT / "docs" / EXAMPLE_PAGES[name]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_includes_is_the_file(page: Path) -> None:
    for path, text in included(page):
        assert text == as_code(path.read_text(encoding="utf-8")), f"python -m {__spec__.name} writes {page.name} anew"
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- include:") == text.count("<!-- /include -->") == len(INCLUDE.findall(text))


def test_the_sizes_of_examples_are_as_stated() -> None:
    reported = re.findall(r"\[(\d+) lines\]\((\S+)\)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(reported) == len(EXAMPLE_PAGES)
    for lines, path in reported:
        assert int(lines) == len((ROOT / path).read_text(encoding="utf-8").splitlines()), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in link and not link.startswith("mailto:"):
            assert (page.parent / link).exists(), link


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new = INCLUDE.sub(
            lambda m, page=page: (
                f"<!-- include: {m[1]} -->\n"
                f"{as_code((page.parent / m[1]).read_text(encoding='utf-8'))}<!-- /include -->"
            ),
            text,
        )
        if new != text:
            page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
