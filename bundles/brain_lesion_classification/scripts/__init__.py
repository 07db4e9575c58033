"""Code that the configs of this bundle name by `_target_`."""
