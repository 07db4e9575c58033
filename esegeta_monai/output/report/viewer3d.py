"""The optional 3D view: NiiVue (BSD-2), read from an installed package when a report is written; it is not included."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from esegeta_monai.errors import UsageError

__all__ = ["HOW_TO_INSTALL", "find_niivue"]

HOW_TO_INSTALL = (
    'pip install "nilearn>=0.11", which includes NiiVue, or npm install @niivue/niivue in the working folder'
)
_PLACES = ("_assets/js/niivue.umd.js", "plotting/data/js/niivue.umd.js")
_NPM = Path("node_modules") / "@niivue" / "niivue" / "dist" / "niivue.umd.js"


def find_niivue() -> Path:
    """Return the one-file build of NiiVue, from nilearn or from ``node_modules`` in the working folder or above it.

    Raises:
        UsageError: NiiVue is not installed; the message names the packages that include it.
    """
    spec = find_spec("nilearn")
    roots = [Path(place) for place in (spec.submodule_search_locations or [])] if spec is not None else []
    candidates = [root / place for root in roots for place in _PLACES]
    here = Path.cwd()
    candidates += [folder / _NPM for folder in (here, *here.parents)]
    for path in candidates:
        if path.is_file():
            return path
    raise UsageError(
        f"the 3D view needs NiiVue: {HOW_TO_INSTALL}; or omit --view-3d, the report is complete without it"
    )
