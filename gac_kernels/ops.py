"""The public operations: pick the backend by device and call it."""

from gac_kernels.reference import absorb_, mix_, moments, pair_moments, sketch, token_moments

__all__ = ["absorb_", "mix_", "moments", "pair_moments", "sketch", "token_moments"]
