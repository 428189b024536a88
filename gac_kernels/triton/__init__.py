"""The Triton backend: :mod:`gac_kernels.reference`'s operations on GPUs, or on CPU tensors in Triton's interpreter.

Importing this package imports Triton; :mod:`gac_kernels` does so at the first call that needs it.
"""

from gac_kernels.triton.accumulating import accumulate_
from gac_kernels.triton.kronecker import kronecker_sketch
from gac_kernels.triton.operations import absorb_, mix_, moments, pair_moments, token_moments
from gac_kernels.triton.sketching import absorb_sketch_, sketch

__all__ = [
    "absorb_",
    "absorb_sketch_",
    "accumulate_",
    "kronecker_sketch",
    "mix_",
    "moments",
    "pair_moments",
    "sketch",
    "token_moments",
]
