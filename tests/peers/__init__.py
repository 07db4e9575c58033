"""Oracles that need torchvision, in an environment of their own: ``make test-peers``."""
