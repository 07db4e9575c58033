"""Remedies for text that cannot be read: one sentence for each natural mistake."""

from __future__ import annotations

import difflib
import keyword
import re
from collections.abc import Sequence

__all__ = ["near_names", "separated_by_commas", "write_instead"]

_GENERAL = "write Name or Name(parameter=value), and text that is no plain word in quotes, such as layer='model.0'"


def near_names(name: str, known: Sequence[str]) -> str:
    """Return ``": did you mean ...?"`` with up to two known names that resemble the given one, else nothing.

    >>> near_names("--bundel", ["--bundle", "--device"])
    ': did you mean --bundle?'
    """
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return f": did you mean {' or '.join(near)}?" if near else ""


def separated_by_commas(text: str) -> str | None:
    """Return names that spaces, semicolons or other signs outside of brackets separate, with commas; else None.

    >>> separated_by_commas("Saliency; GradCam(layer='model.0')")
    "Saliency,GradCam(layer='model.0')"
    """
    parts = [part for part in re.split(r"[\s;|/+&]+(?![^(]*\))", text.strip()) if part]
    whole = all(re.fullmatch(r"[^\W\d][\w.-]*(\(.*\))?", part) for part in parts)
    return ",".join(parts) if len(parts) > 1 and whole else None


def write_instead(text: str, parameters: Sequence[str] = ()) -> str:
    """Return the remedy for text that is no ``Name(parameter=value)``.

    Args:
        text: the text.
        parameters: the names of the parameters, where the name before the bracket is known.

    >>> write_instead("Occlusion(window=64x64)")
    'write 64x64 as a list: [64, 64]'
    """
    if len(re.findall(r"(?<!\\)'", text)) % 2 or text.count('"') % 2:
        return "a quote is not closed"
    for opening, closing in ("()", "[]", "{}"):
        if text.count(opening) != text.count(closing):
            return f"a bracket is missing: it has {text.count(opening)} {opening} and {text.count(closing)} {closing}"
    outside = re.sub(r"'[^']*'|\"[^\"]*\"", "''", text)
    if size := re.search(r"\b\d+(?:\s*[x×]\s*\d+)+\b", outside):
        numbers = ", ".join(re.findall(r"\d+", size[0]))
        return f"write {size[0]} as a list: [{numbers}]"
    if unit := re.search(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([a-zA-Zµ%]+)(?!\w)", outside):
        return f"write {unit[0]} without its unit: {unit[1]}, in the unit that the description of the parameter states"
    words = [word for word in re.findall(r"(\w+)\s*=", outside) if keyword.iskeyword(word)]
    if words:
        those = f"; the parameters are: {', '.join(parameters)}" if parameters else ""
        return f"no parameter is called {words[0]!r}, a reserved word of Python{those}"
    commas = separated_by_commas(text)
    return _GENERAL if commas is None else f"separate several by commas: {commas}"
