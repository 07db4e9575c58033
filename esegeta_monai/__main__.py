"""``python -m esegeta_monai``: the same as ``esegeta-monai``."""

from __future__ import annotations

import os
import sys

# `python -m` puts the working directory first on sys.path, so that files in it hide modules that are imported below.
# The installed command does not; here only a checkout, which contains the package, stays on it.
if sys.path[:1] in ([""], [os.getcwd()]) and os.path.dirname(os.path.dirname(os.path.abspath(__file__))) != os.getcwd():
    del sys.path[0]

from esegeta_monai.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
