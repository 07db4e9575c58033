"""Sphinx extension: pages of the site that are made from the repository and from the package.

* The sections of the site and their order are the tables of index.md: each ``##`` heading with a table becomes a page.
* README, CHANGELOG, CONTRIBUTING, ... and the pages of the bundles, which lie outside of docs/, are copied.
* The reference is written by `site_reference`.
* Links from pages to other files of the repository lead to its address, if that is known, else they are plain text.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

import site_reference

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
MADE = DOCS / "_generated"
COPIED = {
    "README.md": "readme.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "bundles/brain_tissue_segmentation/docs/README.md": "bundle_tissue.md",
    "bundles/brain_lesion_classification/docs/README.md": "bundle_lesion.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
CODE = re.compile(r"(^```.*?^```|^    .*?$|`[^`\n]*`)", re.M | re.S)
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.M | re.S)
HOME = "/".join(os.environ.get(key, "") for key in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")).strip("/")
FOLDERS = {
    "bundles/brain_tissue_segmentation": "bundle_tissue.md",
    "bundles/brain_lesion_classification": "bundle_lesion.md",
}


def translate(text: str, source: str) -> str:
    """Return Markdown with the links of the file ``source`` (path in the repository) as the site needs them."""
    here = posixpath.dirname(f"docs/_generated/{COPIED[source]}") if source in COPIED else posixpath.dirname(source)

    def link(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        made = COPIED.get(path) or FOLDERS.get(path)
        if made is not None:
            path = f"docs/_generated/{made}"
        elif not path.startswith("docs/") or path.startswith("docs/examples") or path == "docs":
            return f"[{words}]({HOME}/blob/main/{path})" if HOME else words
        return f"{picture}[{words}]({posixpath.relpath(path, here)}{'#' + anchor if anchor else ''})"

    parts = CODE.split(text)
    parts[::2] = [LINK.sub(link, part) if part else part for part in parts[::2]]
    return _join_code_in_links("".join(parts), link)


def _join_code_in_links(text: str, link: Any) -> str:
    """Links whose text has code (``[`name`](file)``), which are cut apart with the code."""
    return re.sub(r"(!?)\[(`[^`\n]*`)\]\(([^)\s]+)\)", link, text)


def write_sections() -> None:
    """Write a page for each section of index.md, with its table and the list of its pages."""
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    for title, body in SECTION.findall(text):
        pages = [target for _, _, target in LINK.findall(body) if target.partition("#")[0].endswith(".md")]
        if not pages:
            continue
        entries = []
        for target in dict.fromkeys(pages):
            path = posixpath.normpath(posixpath.join("docs", target))
            page = f"_generated/{COPIED[path]}" if path in COPIED else posixpath.relpath(path, "docs")
            entries.append(f"Overview </{page}>" if path == "README.md" else f"/{page}")
        if title == "Reference":
            entries += [f"/_generated/{name}" for name in site_reference.PAGES]
        moved = re.sub(r"\]\((?!https?:)([^)\s]+)\)", lambda m: f"](../{m[1]})", body)
        page = f"# {title}\n\n{translate(moved, f'docs/_generated/{title.lower()}.md')}\n\n"
        page += f"{site_reference.SUMMARY}\n" if title == "Reference" else ""
        page += "```{toctree}\n:hidden:\n:maxdepth: 1\n\n" + "\n".join(entries) + "\n```\n"
        (MADE / f"{title.lower()}.md").write_text(page, encoding="utf-8")


def sections() -> list[str]:
    """Return the names of the pages of sections, in order."""
    found = SECTION.findall((DOCS / "index.md").read_text(encoding="utf-8"))
    return [title.lower() for title, body in found if ".md)" in body]


def read_source(app: Any, name: str, content: list[str]) -> None:
    """Adapt a page as it is read."""
    if not name.startswith("_generated/"):
        content[0] = translate(content[0], f"docs/{name}.md")
    if name == "index":
        names = "\n".join(f"_generated/{section}" for section in sections())
        content[0] += f"\n\n```{{toctree}}\n:hidden:\n\n{names}\n```\n"


def escape(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Escape what is plain text in our docstrings and markup in RST: the star of ``*spatial`` and bars of |a|."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`[^`]*`)", line)
        if line.lstrip().startswith((">>>", "...", "..")):
            continue
        for i in range(0, len(parts), 2):
            parts[i] = re.sub(r"(?<![*\w])\*(?=[A-Za-z])(?![^*]*\w\*)", r"\\*", parts[i]).replace("|", r"\|")
        lines[number] = "".join(parts)


def setup(app: Any) -> dict[str, bool]:
    """Write the generated pages, and connect to Sphinx."""
    shutil.rmtree(MADE, ignore_errors=True)
    MADE.mkdir()
    for source, name in COPIED.items():
        (MADE / name).write_text(translate((ROOT / source).read_text(encoding="utf-8"), source), encoding="utf-8")
    site_reference.write(MADE)
    write_sections()
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", escape, priority=400)  # before napoleon
    return {"parallel_read_safe": True, "parallel_write_safe": True}
