"""Prose and names use standard terms: no word or pattern of `PATTERNS` beyond the hits of ``language_allowed.json``.

Searched are docstrings, comments, messages and bound names of the package, docstrings, comments and bound names of
tests and benchmarks, and the pages. The file counts the hits left per file and may only shrink:
``python -m tests.test_language`` lists all hits, ``--write`` writes the file anew unless the total would grow.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = Path(__file__).with_name("language_allowed.json")

_UNIT = r"(?:axis|batch|case|channel|class|epoch|feature|file|image|layer|map|method|metric|process|rank|region"
_UNIT += r"|target|voxel|window)"
_COUNTED = r"(?:one|two|three|\d+|number|value|map|row|page|file|folder|step|sample|mask|image|score|object|objective"
_COUNTED += r"|draw|pass|call|sum|weight|entry|set|point|feature|logit|cell|node|process)(?:s|es)?"

#: Standard term: pattern of what is written instead, in text joined to single spaces.
PATTERNS = {
    "reports, states": r"\b(?:says|said|tells|told)\b",
    "is stored, is": r"\blies? (?:there|as)\b"
    r"|\blies? (?:in|under|beside|behind) [^.,;]{0,20}\b(?:folder|file|disk|memory|cache|%s)",
    "is (stands)": r"\bstands? (?:in|on|where|beside|before|there|behind|under)\b",
    "expensive": r"\bdear(?:er|est)?\b",
    "recorded, added": r"\bbook(?:s|ed|ing)?\b",
    "per …": rf"\b{_COUNTED} an? {_UNIT}\b|\ban? (?!what\b)[a-z]+ each(?=[,.;:)]|$)",
    "of which": r"(?<!each )(?<!all )(?<!both )(?<!some )\bof which\b",
    "available": r"\bwhat there is\b",
    "synthesised": r"\bmade[ -]up\b",
    "reaches": r"\bcomes? to\b|\bcame to\b",
    "follows": r"\bgo(?:es)? by\b",
    "passes": r"\bhand(?:s|ed)? (?:over|on)\b",
    "short": r"\bin brief\b|\bthe brief\b",
    "decided": r"\bsettled\b",
    "over budget": r"\btired\b|\bpatience\b",
    "readers": r"\bwho (?:wonders|met)\b",
    "interfaces, modules": r"\bdoors?\b|\brooms\b|\bface\b",
    "after (a layer)": r"\bbehind (?:an?|the|it|its|another|each|which|windows|those)\b",
    "correct, change": r"\bmend(?:s|ed)?\b",
    "a number of": r"\bso many\b",
    "simulated": r"\bpretend(?:s|ed)?\b",
    "True if …, a noun or a verb": r"(?-i:(?:^|[.:;] )(?:What|Whether|Of)) (?![^.]*\?)",
}
_COMPILED = {term: re.compile(pattern, re.IGNORECASE) for term, pattern in PATTERNS.items()}

#: Names that are bound: variables, parameters, attributes, functions.
NAMES = re.compile(
    r"found|told|said|mine|theirs|booked|book|made_up|tired|patience|settled|in_brief|brief|steered|needs_value"
)

#: Normal English that the patterns would hit: removed before the search.
EXCEPTIONS = [
    r"\bouter face\b",  # of a volume
    r"\bcomes? to an end\b",
    r"``booked``",  # a key of records
]

_HASHED = "its source is hashed into cells.csv: after a change, measured cells of other libraries would be out of date"
#: Hits that stay, by file, with the reason.
JUSTIFIED = {
    ("tests/compatibility/checks.py", "name: found"): _HASHED,
    (
        "tests/compatibility/checks.py",
        "True if …, a noun or a verb: …What a class's mean shares out: wei…",
    ): _HASHED,
}


def _normal(text: str) -> str:
    """Join the text to one line, without the exceptions."""
    text = " ".join(text.split())
    for exception in EXCEPTIONS:
        text = re.sub(exception, "", text, flags=re.IGNORECASE)
    return text


def _strings(tree: ast.Module, docstrings_only: bool) -> Iterator[tuple[int, str]]:
    """Line and text of docstrings, and of all other strings with a space unless ``docstrings_only``."""
    parts = {id(v) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for v in n.values}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and docstrings_only:
            if docstring := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), docstring
        elif isinstance(node, ast.JoinedStr) and not docstrings_only:
            yield node.lineno, "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif docstrings_only or not isinstance(node, ast.Constant) or id(node) in parts:
            continue
        elif isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of comments; those of consecutive lines are one text."""
    block: list[str] = []
    start = last = -1  # `last`: line of the last comment without code in front of it
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, text = token.start[0], token.string.lstrip("#: ")
            alone = not token.line[: token.start[1]].strip()
            if not (alone and block and line == last + 1):
                if block:
                    yield start, " ".join(block)
                block, start = [], line
            block.append(text)
            last = line if alone else -1
    if block:
        yield start, " ".join(block)


def _names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of everything that the module binds."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name


def hits_of_text(text: str) -> Iterator[str]:
    """Yield ``term: words`` for each hit in a text."""
    text = _normal(text)
    for term, pattern in _COMPILED.items():
        for match in pattern.finditer(text):
            yield f"{term}: …{text[max(0, match.start() - 20) : match.end() + 30]}…"


def hits_of_python(source: str, docstrings_only: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line, hit) of a Python file."""
    tree = ast.parse(source)
    for line, text in [*_strings(tree, docstrings_only), *_comments(source)]:
        for hit in hits_of_text(text):
            yield line, hit
    for line, name in _names(tree):
        if NAMES.fullmatch(name):
            yield line, f"name: {name}"


def hits_of_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line, hit) of a Markdown page, paragraph by paragraph, without its code blocks."""
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"(?:[^\n]+\n?)+", text):
        for hit in hits_of_text(match[0]):
            yield text.count("\n", 0, match.start()) + 1, hit


def hits() -> dict[str, list[tuple[int, str]]]:
    """Return (line, hit) of each file that has any, by its path."""
    result: dict[str, list[tuple[int, str]]] = {}
    for folder in ("esegeta_monai", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__):
                source = path.read_text(encoding="utf-8")
                result[path.relative_to(ROOT).as_posix()] = list(hits_of_python(source, folder != "esegeta_monai"))
    for pattern in ("*.md", "docs/**/*.md", "bundles/*/docs/*.md"):
        for path in sorted(ROOT.glob(pattern)):
            if {"_generated", "_build"} & set(path.parts):  # by Sphinx, from other files
                continue
            text = path.read_text(encoding="utf-8")
            result[path.relative_to(ROOT).as_posix()] = list(hits_of_page(text))
    left = {name: [v for v in values if (name, v[1]) not in JUSTIFIED] for name, values in result.items()}
    return {name: values for name, values in left.items() if values}


def test_justified_hits_still_exist() -> None:
    for name, hit in JUSTIFIED:
        assert hit in {h for _, h in hits_of_python((ROOT / name).read_text(encoding="utf-8"), docstrings_only=True)}


def test_prose_and_names_use_standard_terms() -> None:
    allowed, now = json.loads(ALLOWED.read_text(encoding="utf-8")), hits()
    new = {name: values for name, values in now.items() if len(values) > allowed.get(name, 0)}
    text = "\n".join(f"{name}:{line}: {hit}" for name, values in new.items() for line, hit in values)
    assert not new, f"use standard terms (all hits of the files that have more than before):\n{text}"
    fewer = [name for name, count in allowed.items() if len(now.get(name, [])) < count]
    assert not fewer, f"improved: python -m tests.test_language --write\n{fewer}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The record says how much.", "reports, states"),
        ("A sidecar that lies there.", "is stored, is"),
        ("One value a target.", "per …"),
        ("A target each.", "per …"),
        ("Whether the value is linear.", "True if …, a noun or a verb"),
        ("The map. What it lacks is added.", "True if …, a noun or a verb"),
        ("Images that were\nmade up.", "synthesised"),
        ("Values lie in [0, 1].", None),
        ("The voxel lies outside the box.", None),
        ("Two lists, each of which is sorted.", None),
        ("Is it linear? What is the value?", None),
        ("A method a user writes; the interface of a surface.", None),
    ],
)
def test_what_is_a_hit(text: str, expected: str | None) -> None:
    assert [hit.partition(":")[0] for hit in hits_of_text(text)] == ([] if expected is None else [expected])


def test_where_python_is_searched() -> None:
    source = '''
"""The module said."""
def f(told):
    """The function said."""
    found = self.mine = 1  # it was
    # said
    raise ValueError(f"it {said} was said", "said")
'''
    reported = sorted((line, hit.partition(":")[0]) for line, hit in hits_of_python(source))
    prose = [(line, "reports, states") for line in (2, 4, 6, 7)]
    assert reported == sorted([*prose, (3, "name"), (5, "name"), (5, "name")])
    prose = [(line, "reports, states") for line in (1, 3, 6)]  # a docstring counts at the line of its owner
    reported = sorted((line, hit.partition(":")[0]) for line, hit in hits_of_python(source, docstrings_only=True))
    assert reported == sorted([*prose, (3, "name"), (5, "name"), (5, "name")])


def test_code_of_a_page_is_not_searched() -> None:
    assert list(hits_of_page("# Said\n\n```\nsaid\n```\n\nIt is\nsaid.\n")) == [
        (1, "reports, states: …# Said…"),
        (7, "reports, states: …It is said.…"),
    ]


def main(arguments: list[str]) -> None:
    """List all hits, or write the file of allowed ones unless their number would grow."""
    now = hits()
    if arguments != ["--write"]:
        print("\n".join(f"{name}:{line}: {hit}" for name, values in now.items() for line, hit in values))
        return
    counts = {name: len(values) for name, values in sorted(now.items())}
    before = json.loads(ALLOWED.read_text(encoding="utf-8")) if ALLOWED.exists() else None
    if before is not None and sum(counts.values()) > sum(before.values()):
        grown = {name: count for name, count in counts.items() if count > before.get(name, 0)}
        sys.exit(f"{sum(counts.values())} hits, {sum(before.values())} before; more than before: {grown}")
    ALLOWED.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
