"""Tests that need nnunetv2, in an environment of its own: ``make test-nnunet``."""
