"""Comparisons with other packages, run by hand; docs/peers.md has the figures. Nothing here is collected by pytest."""
