"""The Triton backend: :mod:`gac_kernels.reference`'s operations on GPUs, or on CPU tensors in Triton's interpreter.

Importing this package imports Triton; :mod:`gac_kernels` does so at the first call that needs it.
"""

from gac_kernels.triton.operations import absorb_, accumulate_, mix_, moments, pair_moments, sketch, token_moments

__all__ = ["absorb_", "accumulate_", "mix_", "moments", "pair_moments", "sketch", "token_moments"]
