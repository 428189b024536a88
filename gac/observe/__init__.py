"""Gradients to sums: hooks notice contributions, ledgers keep their sketches, a reduction adds them up over ranks."""
