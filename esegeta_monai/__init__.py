"""esegeta_monai: exact whole-volume explanation of 2D and 3D medical image networks, native to MONAI."""

from __future__ import annotations

import os
import sys

# `python -m esegeta_monai` puts the working directory first on sys.path, where files of a bundle would hide the modules
# that are imported below. The installed command does not; here only a checkout, which contains this package, stays on
# it. While Python looks for the module of -m, sys.argv[0] is "-m".
if (
    sys.argv[:1] == ["-m"]
    and "esegeta_monai" in sys.orig_argv
    and sys.path[:1] in ([""], [os.getcwd()])
    and os.path.dirname(os.path.dirname(os.path.abspath(__file__))) != os.getcwd()
):
    del sys.path[0]

from esegeta_monai.explain.explainer import Attribution, Attributions, Explainer
from esegeta_monai.utils.files import VERSION

__version__ = VERSION
__all__ = ["Attribution", "Attributions", "Explainer", "__version__"]
