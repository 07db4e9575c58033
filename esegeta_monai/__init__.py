"""esegeta_monai: exact whole-volume explanation of 2D and 3D medical image networks, native to MONAI."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# `python -m esegeta_monai` puts the working directory first on sys.path, where files of a bundle would hide the modules
# that are imported below. The installed command does not; here only a checkout, which contains this package, stays on
# it. While Python looks for the module of -m, sys.argv[0] is "-m".
if sys.argv[:1] == ["-m"] and "esegeta_monai" in sys.orig_argv:
    try:
        _here = os.getcwd()
    except FileNotFoundError:  # it was removed: nothing can be imported from there
        _here = ""
    if sys.path[:1] in ([""], [_here]) and os.path.dirname(os.path.dirname(__file__)) != _here:
        del sys.path[0]

from esegeta_monai.utils.files import VERSION

if TYPE_CHECKING:
    from esegeta_monai.explain.explainer import Attribution, Attributions, Explainer

__version__ = VERSION
__all__ = ["Attribution", "Attributions", "Explainer", "__version__"]

_LAZY = dict.fromkeys(("Attribution", "Attributions", "Explainer"), "explain.explainer")
_PACKAGES = (
    *("bundle", "engine", "errors", "explain", "files", "handlers", "methods", "metrics", "output", "targets"),
    *("transforms", "utils"),
)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch and MONAI take seconds, which ``--help`` must not."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names and the packages."""
    return sorted({*globals(), *_LAZY, *_PACKAGES})
