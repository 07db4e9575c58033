"""Refuse overrides and settings that would change nothing, because a name in them is misspelled."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from esegeta_monai.bundle.configs import config_entries, parse_config
from esegeta_monai.errors import UsageError
from esegeta_monai.utils.mistakes import near_names

__all__ = ["check_overrides", "check_settings", "check_typed_settings", "overlay_ids"]

_PART = re.compile("::|#")


def check_overrides(config: Any, overrides: Mapping[str, Any], files: str, read: Collection[str]) -> None:
    """Check that each override replaces an entry of the config, or adds one that something reads.

    Args:
        config: the merged config, before the overrides.
        overrides: values by id.
        files: the config files, for the message.
        read: ids that this package reads by itself.

    Raises:
        UsageError: an override would change nothing. The message names entries that may have been meant.

    >>> check_overrides({"inferer": {"overlap": 0.5}}, {"overlap": 0.25}, "configs/inference.json", ["inferer"])
    Traceback (most recent call last):
    esegeta_monai.errors.UsageError: configs/inference.json has no entry 'overlap' ...: did you mean inferer#overlap?
    """
    if not isinstance(config, Mapping):
        return
    texts = [value for _, value in config_entries([config, dict(overrides)]) if isinstance(value, str)]
    named = set(re.findall(r"[@%](\w+)", " ".join(text for text in texts if text[:1] in "@%$")))
    known = {*config, *named, *(_PART.split(key)[0] for key in read), ConfigParser.meta_key}
    check_settings([key for key in overrides if key.startswith("explain_")], overlay_ids())
    for key in overrides:
        if _PART.split(key)[0] not in known and not key.startswith("explain_"):  # of an overlay, which merge adds
            raise UsageError(f"{files} has no entry {key!r} that a value could replace{_meant(key, config)}")


def _meant(key: str, config: Mapping[str, Any]) -> str:
    own = {top: value for top, value in config.items() if top != ConfigParser.meta_key}
    ids = [path.replace("::", "#") for path, _ in config_entries(own) if path]
    dotted = key.replace(".", "#").replace("::", "#")
    last = dotted.rpartition("#")[2]
    same = [path for path in ids if path == dotted or path.rpartition("#")[2] == last]
    near = same or difflib.get_close_matches(dotted, ids, n=2, cutoff=0.7)
    near = near or [path for path in ids if difflib.get_close_matches(path.rpartition("#")[2], [last], cutoff=0.8)]
    near = sorted(near, key=lambda path: path != dotted)[:2]
    return f": did you mean {' or '.join(near)}?" if near else f"; its entries are: {', '.join(map(str, own))}"


def check_settings(names: Iterable[str], known: Collection[str]) -> None:
    """Refuse settings of an overlay that are misspelled; names that resemble none belong to the bundle.

    Args:
        names: ids, also nested ones such as ``explain_handler#pictures``.
        known: the ids of the overlay.

    Raises:
        UsageError: a name is not known, but resembles one that is.

    >>> check_settings(["explain_metods"], ["explain_methods", "explain_targets"])
    Traceback (most recent call last):
    esegeta_monai.errors.UsageError: the overlay has no setting explain_metods: did you mean explain_methods?
    """
    for name in (_PART.split(text)[0] for text in names):
        if name not in known and (near := near_names(name, list(known))):
            raise UsageError(f"the overlay has no setting {name}{near}")


def overlay_ids() -> set[str]:
    """Return the ids of the overlays of this package, such as ``explain_methods``."""
    files = Path(__file__).parent.glob("*explain*.json")
    return {key.lstrip("+") for file in files for key in parse_config(file)}


def check_typed_settings() -> None:
    """Refuse misspelled settings on the command line of ``monai.bundle run``, which adds unknown ids without a word.

    Raises:
        UsageError: see `check_settings`.
    """
    if Path(sys.argv[0]).parts[-3:] != ("monai", "bundle", "__main__.py"):
        return
    typed = [text.lstrip("-").partition("=")[0] for text in sys.argv[1:] if text.startswith("--explain_")]
    check_settings(typed, overlay_ids())
