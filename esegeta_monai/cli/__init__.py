"""The commands of ``esegeta-monai``; `esegeta_monai.cli.main` parses their options and calls their ``run``."""
