"""The operations on CPU tensors, by the C++ library in ``csrc/``: one call for a whole list of tensors.

Same names, signatures, checks and results as :mod:`gac_kernels.reference`. Importing loads nothing; the library is
loaded by the first call or by :func:`available`, which also puts builtins in the places of the functions that have one.
"""

from functools import cache

from gac_kernels import arguments
from gac_kernels.cpu.builtins import DESCRIBE, NAMES, builtins_for
from gac_kernels.cpu.library import Library, failure, load
from gac_kernels.cpu.operations import absorb_, absorb_sketch_, accumulate_, mix_, moments, pair_moments, sketch
from gac_kernels.cpu.tokens import token_moments
from gac_kernels.fallback import kronecker_sketch  # matrix products: BLAS is what serves them best

__all__ = [
    "absorb_",
    "absorb_sketch_",
    "accumulate_",
    "available",
    "kronecker_sketch",
    "mix_",
    "moments",
    "pair_moments",
    "sketch",
    "status",
    "token_moments",
]


@cache
def _put_builtins(library: Library) -> None:
    functions = globals()
    behind = {name: functions[name] for name in NAMES} | {DESCRIBE: arguments.describe}
    builtins = builtins_for(library.quick, behind)
    arguments.describe = builtins.pop(DESCRIBE, arguments.describe)
    functions.update(builtins)


def available() -> bool:
    """True when the library is there and loads; loads it, and puts the builtins in their places."""
    library = load()
    if library is not None:
        _put_builtins(library)
    return library is not None


def status() -> dict:
    """What a bug report needs: ``available``, ``path``, ``isa`` of each operation, ``threads``, or the ``reason``."""
    library = load()
    if library is None:
        return {"available": False, "reason": failure()}
    names = ("moments", "sketch", "pair_moments", "mix_", "token_moments", "absorb_", "absorb_sketch_", "accumulate_")
    return {
        "available": True,
        "path": str(library.path),
        "isa": dict.fromkeys(names, library.isa),
        "threads": library.threading,
    }
