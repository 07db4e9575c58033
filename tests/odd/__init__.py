"""Odd networks, heads, images and pipelines, each with its true maps: what is right, warned of, refused, or wrong.

    base.py       an odd case and its twin, an ordinary network that computes the same function
    truth.py      the true maps of six methods by autograd, brute force and hooks; of the others by the twin
    measure.py    the outcome of one cell, method x case
    batch.py …    the cases, one file a kind; pipelines.py is measured through the command line
    known.py      cells that are wrong at present; their tests are expected to fail
    table.py      docs/limits.md
    test_odd.py   the part that runs in ``make test``

``python -m tests.odd`` measures what is missing or out of date and writes the table.
"""

from __future__ import annotations

import importlib

from tests.odd.base import OddCase

__all__ = ["CASES", "KINDS"]

KINDS = (
    "batch",
    "stochastic",
    "derivative",
    "repeated",
    "writers",
    "layout",
    "heads",
    "outputs",
    "inputs",
    "modules",
    "pipelines",
)

CASES: list[OddCase] = [case for kind in KINDS for case in importlib.import_module(f"tests.odd.{kind}").CASES]
