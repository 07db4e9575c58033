"""``python -m esegeta_monai``: the same as ``esegeta-monai``."""

from __future__ import annotations

import sys

from esegeta_monai.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
