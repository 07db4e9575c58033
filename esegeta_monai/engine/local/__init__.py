"""Passes below the window: only the part of each layer that a perturbation changes and that a target reads."""
