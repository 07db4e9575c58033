"""What the commands of ``esegeta-monai`` do; `esegeta_monai.cli.main` reads their options and calls their ``run``."""
