"""A run of ``gac train``: its configuration, its folder, its training."""
