"""What the commands of ``esegeta-monai`` do; `esegeta_monai.cli` reads their options and calls their ``run``."""
