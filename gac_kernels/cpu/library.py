"""Finds and loads the C++ library (``csrc/``, built by ``setup.py`` into ``gac_kernels/_lib``) on first use."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p, py_object
from functools import cache
from pathlib import Path

ISA_VARIABLE = "GAC_CPU_ISA"
"""Environment variable that limits the instruction set: portable, avx2, avx512 or neon. Read when the library loads."""

INTERFACE = {
    "version": "10",
    "gac_interface": "const char*()",
    "gac_select": "int(const char*)",
    "gac_isa": "const char*()",
    "gac_threading": "const char*()",
    "gac_prefer_pool": "void(int)",
    "gac_moments": "int(const int64*, int64, int, int, double*, int)",
    "gac_moments_one": "int(const void*, int64, double*)",
    "gac_pair_moments": "int(const int64*, const int64*, int64, int, int, double*, int)",
    "gac_pair_moments_one": "int(const void*, const void*, int64, double*)",
    "gac_mix": "int(const int64*, const int64*, int64, int, double, double*, int)",
    "gac_mix_one": "int(void*, const void*, int64, double, double*)",
    "gac_sketch": "int(const int64*, const int64*, int64, int, const gac_sketch_map*, double*, int)",
    "gac_sketch_weighted": (
        "int(const int64*, const int64*, const int64*, int64, int, const gac_sketch_map*, double, double*, int)"
    ),
    "gac_token_moments": "int(const gac_tokens*, double*, int)",
    "gac_absorb": "int(const float*, float*, float*, int64, double, double*, int, int)",
    "gac_accumulate": "int(const int64*, const int64*, int64, int, const gac_sum*, double*, int)",
    "gac_step_sums": "int(const gac_step*, double*, int)",
    "gac_step_end": "int(const gac_ending*)",
    "gac_python_call": "object*(const char*, object*, const void*, const void*, const void*, int64)",
    "gac_python_names": "const char*()",
    "gac_arriving_new": "object*(object*)",
    "gac_arriving_hooks": "object*(object*, object*, int64, int64, int64)",
    "gac_arriving_begin": "void(object*, const gac_adding*)",
    "gac_arriving_end": "int64(object*, double*)",
    "gac_arriving_sums": "void(object*, double*, double*, int64*)",
    "struct gac_sketch_map": "qqQdPPqqiiiii",
    "struct gac_sum": "PPPddiii",
    "struct gac_tokens": "qqPqqPqqPqqPqiiii",
    "struct gac_step": "PPPPqqqqqii",
    "struct gac_ending": "PPPPPdddqiiiiii",
    "struct gac_adding": "PPdqii",
    "sums of a step": "0 2 4 6 7 8 11 13",
    "state after a step": "0 20 21 22 23 24 28 32 36 40 43 46 48 50 62 80",
    "raw and skipped in its row": "1 4",
    "options of the law": "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 20",
    "dtypes": "float32 bfloat16 float16 float64 float8_e4m3fn float8_e5m2",
    "dtypes of two lists": "4",
    "dtype of scales, elements of each": "6 32",
    "elements of a sum of absorb_": "1024",
    "lanes of a sum of absorb_sketch_": "128",
}
"""What this package takes the library to be, in the words of ``gac_interface()``: functions, formats of structs for the
module ``struct``, codes of dtypes from 0 on, and numbers. The library has made its own from ``csrc/gac_cpu.h``."""

_CODES = {1: "null pointer", 2: "out of memory"}
_TYPES = {"void": None, "int": c_int, "int64": c_int64, "double": c_double, "object*": py_object}
_STRUCTS = ("gac_sketch_map", "gac_sum", "gac_tokens", "gac_step", "gac_ending", "gac_adding")
_BYTES = ("const char*", *(f"const {name}*" for name in _STRUCTS))


def _type(name: str) -> type | None:
    """The ctypes type of a type of the table; pointers other than to bytes and objects go as addresses."""
    if name in _BYTES:
        return c_char_p
    return c_void_p if name not in _TYPES and name.endswith("*") else _TYPES[name]


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
        _check_interface(path, self.call)
        for name, signature in INTERFACE.items():
            if signature.endswith(")"):
                result, parameters = signature[:-1].split("(")
                for handle in (self.call, self.quick):
                    function = getattr(handle, name)
                    function.restype = _type(result)
                    function.argtypes = [_type(parameter) for parameter in parameters.split(", ") if parameter]
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


def _check_interface(path: Path, library: ctypes.CDLL) -> None:
    """Raises LibraryError when the library's interface is another than the one this package takes it to have."""
    try:
        function = library.gac_interface
    except AttributeError:
        raise LibraryError(f"{path} does not tell its interface, as older ones do not: reinstall the package") from None
    function.restype = c_char_p
    found = dict(line.split(": ", 1) for line in function().decode().splitlines())
    for name in INTERFACE | found:
        theirs, ours = (table.get(name, "missing") for table in (found, INTERFACE))
        if theirs != ours:
            raise LibraryError(
                f"{path} does not fit this package: {name} is {theirs} there and {ours} here; reinstall the package"
            )


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
