"""Render the HTML templates of a report, with a content security policy that loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.resources import files
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

import esegeta_monai
from esegeta_monai.output.report import words
from esegeta_monai.utils.files import INTENDED_USE

__all__ = ["VIEWER", "environment", "read_text", "render", "short"]

MARKS = {"good": "Good", "note": "Note", "warn": "Careful", "bad": "Problem"}
VIEWER = tuple(f"viewer/{name}.js" for name in ("volumes", "scale", "draw", "bars", "three", "viewer"))
"""The files of the viewer, in the order in which they are loaded."""


def read_text(name: str) -> str:
    return (files("esegeta_monai.output.report") / name).read_text(encoding="utf-8")


def short(value: Any, digits: int = 4) -> str:
    """Format a number with few digits, and with an exponent only if it is shorter.

    >>> short(0.000012345), short(484714.17), short(12.0), short(None), short(-0.0)
    ('1.234e-05', '484,700', '12', '–', '0')
    """
    if not isinstance(value, (int, float)):
        return "–"
    value += 0.0  # -0.0 becomes 0.0
    if abs(value) >= 1000 and abs(value) < 1e9:
        rounded = float(f"{value:.{digits}g}")
        return f"{rounded:,.0f}"
    return f"{value:.{digits}g}"


def _whole(value: Any) -> str:
    return f"{int(value):,}" if isinstance(value, (int, float)) else "–"


def _soft(name: str) -> Markup:
    """Return a name as HTML that may break between its words.

    >>> str(_soft("MultiClassMask-<b>"))
    'Multi<wbr>Class<wbr>Mask-<wbr>&lt;b&gt;'
    """
    parts = re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[-_])(?=\w|<)", name)
    return Markup("<wbr>").join(parts)


def environment(*more: BaseLoader) -> Environment:
    """Return an environment with the templates and filters of a report, and further templates, which come first."""
    templates = Environment(
        loader=ChoiceLoader([*more, FunctionLoader(read_text)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"short": short, "whole": _whole, "soft": _soft}
    templates.globals |= {
        "words": {status: counted(1).removeprefix("1 ") for status, counted in words.STATUS_WORDS.items()},
        "intended_use": INTENDED_USE,
        "version": esegeta_monai.__version__,
    }
    return templates


def render(template: str, scripts: Sequence[str], *, three: bool = False, **context: Any) -> str:
    return (
        environment()
        .get_template(template)
        .render(
            css=Markup(read_text("report.css")),  # safe: our own files, and NiiVue, whose hash is in the page's policy
            scripts=[Markup(script) for script in scripts],
            csp=_policy(scripts, three),
            written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            counted=words.STATUS_WORDS,
            marks=MARKS,
            **context,
        )
    )


def _policy(scripts: Sequence[str], three: bool) -> str:
    """Return a content security policy that allows only these scripts and loads nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    more = " connect-src data: blob:; worker-src blob:; font-src data:;" if three else ""
    eval_ = " 'wasm-unsafe-eval'" if three else ""
    return f"default-src 'none'; script-src {hashes}{eval_}; style-src 'unsafe-inline'; img-src data: blob:;{more}"
