"""Finds and loads the C++ library (``csrc/``, built by ``setup.py`` into ``gac_kernels/_lib``) on first use."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

ISA_VARIABLE = "GAC_CPU_ISA"
"""Environment variable that limits the instruction set: portable, avx2, avx512 or neon. Read when the library loads."""

_ABI = 6
_CODES = {1: "null pointer", 2: "out of memory"}

_PROTOTYPES = {
    "gac_moments": (c_void_p, c_int64, c_int, c_int, c_void_p, c_int),
    "gac_moments_one": (c_void_p, c_int64, c_void_p),
    "gac_pair_moments": (c_void_p, c_void_p, c_int64, c_int, c_int, c_void_p, c_int),
    "gac_pair_moments_one": (c_void_p, c_void_p, c_int64, c_void_p),
    "gac_mix": (c_void_p, c_void_p, c_int64, c_int, c_double, c_void_p, c_int),
    "gac_mix_one": (c_void_p, c_void_p, c_int64, c_double, c_void_p),
    "gac_sketch": (c_void_p, c_void_p, c_int64, c_int, c_char_p, c_void_p, c_int),
    "gac_sketch_weighted": (c_void_p, c_void_p, c_void_p, c_int64, c_int, c_char_p, c_double, c_void_p, c_int),
    "gac_token_moments": (c_char_p, c_void_p, c_int),
    "gac_absorb": (c_void_p, c_void_p, c_void_p, c_int64, c_double, c_void_p, c_int, c_int),
}


class LibraryError(RuntimeError):
    """The library is missing, does not load, or does not fit this package."""


class Library:
    """The loaded library.

    Attributes:
        path: the file.
        call: its functions, which release the interpreter lock; ``call.gac_moments(...)``.
        quick: the same functions called with the lock held: cheaper, for work of a few microseconds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.call = ctypes.CDLL(str(path))
            self.quick = ctypes.PyDLL(str(path))
        except OSError as error:
            raise LibraryError(f"{path} does not load: {error}") from error
        abi = self.call.gac_abi()
        if abi != _ABI:
            raise LibraryError(f"{path} has interface version {abi}, this package needs {_ABI}: reinstall the package")
        for name, types in _PROTOTYPES.items():
            for handle in (self.call, self.quick):
                getattr(handle, name).argtypes = types
        for name in ("gac_isa", "gac_threading"):
            getattr(self.call, name).restype = c_char_p
        self.call.gac_select.argtypes = (c_char_p,)
        wanted = os.environ.get(ISA_VARIABLE, "")
        if wanted:
            self.select(wanted)

    def select(self, isa: str) -> None:
        """Limits the instruction set ("" for the best). Raises LibraryError when CPU or build lacks it."""
        if self.call.gac_select(isa.encode()):
            raise LibraryError(
                f"instruction set {isa!r} is not to be had here: set {ISA_VARIABLE} to portable, or to avx2, avx512 or "
                "neon where the CPU has it, or unset it"
            )

    @property
    def isa(self) -> str:
        return self.call.gac_isa().decode()

    @property
    def threading(self) -> str:
        """``openmp`` (torch's own threads) or ``pool``."""
        return self.call.gac_threading().decode()


def check(code: int) -> None:
    """Raises for a return code other than 0."""
    if code == 1:
        raise TypeError("a tensor has no memory of its own (a wrapper such as DTensor): pass its local part")
    if code:
        raise MemoryError(f"the CPU library failed: {_CODES.get(code, code)}")


def library_path() -> Path:
    """Where the library is, if it was built."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return Path(__file__).resolve().parent.parent / "_lib" / f"libgac_cpu.{suffix}"


_lock = threading.Lock()
_loaded: Library | None = None
_failure: str | None = None


def load() -> Library | None:
    """The library, loaded on the first call; None when it cannot be used (:func:`failure` says why)."""
    global _loaded, _failure
    if _loaded is None and _failure is None:
        with _lock:
            if _loaded is None and _failure is None:
                path = library_path()
                try:
                    if not path.exists():
                        raise LibraryError(
                            f"{path} does not exist: no C++ compiler was found when the package was installed; "
                            "install one and reinstall the package"
                        )
                    _loaded = Library(path)
                except LibraryError as error:
                    _failure = str(error)
    return _loaded


def failure() -> str | None:
    """Why :func:`load` gives None."""
    return _failure


@cache
def require() -> Library:
    """The library, or LibraryError with what to do."""
    library = load()
    if library is None:
        raise LibraryError(_failure)
    return library
