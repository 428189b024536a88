"""Operations that read gradient buffers once: moments, sketches, pair moments, mixing.

Each operation takes a tensor or a list of tensors of any shape, floating dtype and strides, and picks its backend by
device: Triton on GPUs, the C++ library on CPUs, plain torch elsewhere. See :mod:`gac_kernels.ops` for what each takes
and returns, :mod:`gac_kernels.reference` for the formulas.
"""

from gac_kernels import library, reference
from gac_kernels.layout import SketchLayout
from gac_kernels.ops import (
    absorb_,
    absorb_sketch_,
    accumulate_,
    backend_status,
    mix_,
    moments,
    pair_moments,
    sketch,
    token_moments,
)
from gac_kernels.outer_products import kronecker_sketch

__all__ = [
    "SketchLayout",
    "absorb_",
    "absorb_sketch_",
    "accumulate_",
    "backend_status",
    "kronecker_sketch",
    "library",
    "mix_",
    "moments",
    "pair_moments",
    "reference",
    "sketch",
    "token_moments",
]
