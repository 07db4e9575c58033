"""Checks of what the maps take for granted: one small class per assumption."""
