"""Parts of the build that pyproject.toml cannot state: description, links, contact, and the demonstration bundle."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
BUNDLE = Path("bundles") / "brain_lesion_classification"
PAPER = "https://doi.org/10.3390/app12041834"
# The workflow that publishes a release runs at the project's home and knows its address; the sources do not.
SERVER, REPOSITORY = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
HOME = f"{SERVER}/{REPOSITORY}" if SERVER and REPOSITORY else None
# Repository variable CONTACT: the address that PyPI shows. The sources name none.
CONTACT = os.environ.get("ESEGETA_CONTACT") or None
REFERENCE = os.environ.get("GITHUB_REF_NAME", "main")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:|#)([^)\s]+)\)")


def describe(text: str) -> str:
    """Return README.md with links to files made absolute, or as plain text if the project's home is not known."""

    def replace(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        if HOME:
            return f"{picture}[{words}]({HOME}/{'raw' if picture else 'blob'}/{REFERENCE}/{target})"
        return "" if picture else words

    return LINK.sub(replace, text)


class BuildWithBundle(build_py):
    """Copy the demonstration bundle into the package, so that `esegeta-monai demo` works from a wheel."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout has the bundle beside the package
            return
        target = Path(self.build_lib) / "esegeta_monai" / BUNDLE
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(ROOT / BUNDLE, target, ignore=shutil.ignore_patterns("__pycache__", "eval", ".*"))


urls = {"Paper": PAPER}
if HOME:
    urls |= {
        "Homepage": HOME,
        "Documentation": f"{HOME}/blob/{REFERENCE}/docs/index.md",
        "Issues": f"{HOME}/issues",
        "Changelog": f"{HOME}/blob/{REFERENCE}/CHANGELOG.md",
    }
setup(
    long_description=describe((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    author="The esegeta_monai developers",
    author_email=CONTACT,
    project_urls=urls,
    cmdclass={"build_py": BuildWithBundle},
)
