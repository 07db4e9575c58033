"""A question of the page, as the texts of methods and targets that the command line takes."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esegeta_monai.errors import UsageError

__all__ = ["Question", "call_text", "refuse_paths"]

WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KINDS = ("voxel", "component", "class", "other")


@dataclass(frozen=True)
class Question:
    """A question of the page about a case.

    Attributes:
        case: number of the case.
        target: text of the target; None: the default of the command line.
        methods: texts of the methods; empty if a box is asked about.
        box: two corners (world, mm) of a box that is replaced; None: none.
        baseline: what replaces the box.
        time_limit: seconds; None: no limit.
        costly: True: also run what is refused because of its cost.
        metrics: texts of metrics, for an evaluation.
    """

    case: int
    target: str | None = None
    methods: tuple[str, ...] = ()
    box: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    baseline: str = "auto"
    time_limit: float | None = None
    costly: bool = False
    metrics: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        request: Mapping[str, Any],
        cases: int,
        class_names: Mapping[int, str],
        layers: Collection[str] = (),
    ) -> Question:
        """Read the JSON of a request, and check all of it.

        Args:
            request: ``case``; ``target``: ``kind`` (voxel, component, class or other), ``class``, ``world``,
                ``against``, or ``name`` and ``parameters``; ``methods``: a list of ``name`` and ``parameters``;
                ``box``: two corners; ``baseline``; ``time_limit``; ``costly``; ``metrics``.
            cases: number of cases.
            class_names: names by number, for the names of results.
            layers: names of the network's layers, which are no paths.

        Raises:
            UsageError: a part is missing or has a wrong type, or a value could be a path.

        >>> request = {"case": 0, "target": {"kind": "voxel", "class": 1, "world": [1, 2, 3]}}
        >>> question = Question.of({**request, "methods": [{"name": "Saliency"}]}, 1, {1: "liver"})
        >>> question.target
        "Voxel(class_index=1, world=[1.0, 2.0, 3.0], name='Voxel-liver at 1.0 2.0 3.0')"
        """
        case = request.get("case")
        if not isinstance(case, int) or isinstance(case, bool) or not 0 <= case < cases:
            raise UsageError("no such case")
        limit = request.get("time_limit")
        if limit is not None and not (_is_number(limit) and limit > 0):
            raise UsageError("the time limit is a positive number of seconds")
        baseline = request.get("baseline", "auto")
        refuse_paths(baseline)
        box = request.get("box")
        corners = None
        if box is not None:
            if not isinstance(box, list) or len(box) != 2:
                raise UsageError("a box has two corners")
            corners = (_place(box[0]), _place(box[1]))
        methods = tuple(_named(m, layers) for m in _list(request.get("methods")))
        metrics = tuple(_named(m) for m in _list(request.get("metrics")))
        target = request.get("target")
        text = None if target is None else _target(target, class_names, layers)
        costly = request.get("costly") is True
        return cls(case, text, methods, corners, baseline, limit, costly, metrics)


def _list(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > 20:
        raise UsageError("give a list of at most 20 entries")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _place(value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) not in (2, 3) or not all(_is_number(v) for v in value):
        raise UsageError("a place has two or three numbers")
    return tuple(round(float(v), 3) + 0.0 for v in value)


def _class(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError("a class is a number from 0")
    return value


def _target(target: Any, class_names: Mapping[int, str], layers: Collection[str]) -> str:
    """Return the text of a target. Its name has what distinguishes it, so that no other map gets the same file."""
    if not isinstance(target, dict) or target.get("kind") not in KINDS:
        raise UsageError(f"a target has a kind: {', '.join(KINDS)}")
    if target["kind"] == "other":
        return _named(target, layers)
    index = _class(target.get("class"))
    shown = re.sub(r"[^\w ]", "", class_names.get(index, f"class{index}"))[:40].strip() or f"class{index}"
    against = target.get("against")
    if target["kind"] == "class":
        name = f"Class-{shown}"
        text = call_text(target.get("name", "MultiClassMask"), {"class_index": index, "name": name})
    else:
        world = _place(target.get("world"))
        kind, place = ("Voxel", "world") if target["kind"] == "voxel" else ("Component", "which")
        name = f"{kind}-{shown} at {' '.join(f'{v:.1f}' for v in world)}"
        text = call_text(kind, {"class_index": index, place: list(world), "name": name})
    if against is None:
        return text
    other = class_names.get(_class(against), f"class{against}")
    plain = re.sub(r"[^\w ]", "", other)[:40].strip() or str(against)
    name = f"{name} against {plain}"
    return f"Contrast({text}, others={against}, name={name!r})"


def _named(thing: Any, layers: Collection[str] = ()) -> str:
    """Return the text of a method, target or metric given by name and parameters."""
    if not isinstance(thing, dict) or not isinstance(thing.get("name"), str):
        raise UsageError("a method, target or metric has a name")
    parameters = thing.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise UsageError("parameters are an object")
    if parameters and "name" not in parameters:  # else maps with other parameters would have the same file
        marks = "-".join(f"{k}{_short(v)}" for k, v in sorted(parameters.items()))
        parameters = {**parameters, "name": f"{thing['name']}-{marks}"[:80]}
    return call_text(thing["name"], parameters, layers)


def _short(value: Any) -> str:
    return re.sub(r"[^\w.]+", "-", str(value)).strip("-")[:24]


def call_text(name: str, parameters: Mapping[str, Any], layers: Collection[str] = ()) -> str:
    """Return ``Name(parameter=value, ...)``; a text of ``layers`` is no path.

    Raises:
        UsageError: a name is not a plain word, or a value could be a path.

    >>> call_text("Occlusion", {"window": [8, 8, 8]})
    'Occlusion(window=[8, 8, 8])'
    >>> call_text("LabelMask", {"mask": "/etc/passwd"})
    Traceback (most recent call last):
        ...
    esegeta_monai.errors.UsageError: '/etc/passwd' could be the path of a file, which the app does not take
    """
    if not WORD.fullmatch(name) or not all(isinstance(key, str) and WORD.fullmatch(key) for key in parameters):
        raise UsageError("names of methods, targets, metrics and parameters are plain words")
    refuse_paths([value for key, value in parameters.items() if key != "layer" or value not in layers])
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in parameters.items())})"


def refuse_paths(value: Any) -> None:
    """Refuse text that could name a file, also inside lists and objects, and values that are not JSON.

    Raises:
        UsageError: there is one.
    """
    if isinstance(value, (list, tuple)):
        for item in value:
            refuse_paths(item)
    elif isinstance(value, dict):
        refuse_paths([*value.keys(), *value.values()])
    elif isinstance(value, str):
        if len(value) > 500 or re.search(r"[/\\~\x00-\x1f]|\.\.|://", value) or os.path.exists(value):
            raise UsageError(f"{value[:80]!r} could be the path of a file, which the app does not take")
    elif not (value is None or isinstance(value, bool) or _is_number(value)):
        raise UsageError("a value is a number, a text, true, false, null, or a list of these")
