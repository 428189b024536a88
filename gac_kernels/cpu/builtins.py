"""Builtin functions for plain calls, made by the C++ library at run time; see ``csrc/python_calls.cpp``.

They take CPU tensors, or lists of them, that are contiguous and of type ``Tensor`` or ``Parameter``. Every other call
they pass on, with nothing done, to the function behind (``__self__``). They cannot be had on a Python other than
CPython or without its global lock, nor with torch before 2.10, which has no exchange interface.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn import Parameter

from gac_kernels.cpu.library import LibraryError
from gac_kernels.cpu.quick import QUICK

NAMES = ("moments", "pair_moments", "mix_")
"""The operations that have a builtin."""

DESCRIBE = "describe"
"""The pass over a list that the checks of the others begin with: :func:`gac_kernels.arguments.describe`."""

_CAPSULE = b"dlpack_exchange_api"


def _exchange() -> int | None:
    """The address of torch's DLPack exchange interface; None when it has none that the library knows."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    python = ctypes.pythonapi
    valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", python))
    if capsule is None or not valid(capsule, _CAPSULE):
        return None
    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", python))
    address = pointer(capsule, _CAPSULE)
    major, minor = (ctypes.c_uint32 * 2).from_address(address)
    return address if major == 1 and minor >= 3 else None


def _increment_version() -> Callable:
    """What the public function calls, a tenth of a microsecond cheaper, where it takes a sequence of tensors."""
    inner = getattr(torch._C, "_increment_version", None)
    scratch = torch.zeros(1)
    before = scratch._version
    try:
        inner((scratch,))
    except (AttributeError, TypeError):
        return graph.increment_version
    return inner if scratch._version > before else graph.increment_version


def _names(library: ctypes.PyDLL) -> tuple[list[str], list[str]]:
    """Names of the functions of Python's C interface and of the objects that the library asks for, in its order."""
    functions, objects = library.gac_python_names().decode().splitlines()
    return functions.split()[1:], objects.split()[1:]


def _objects() -> dict[str, object]:
    """What the library may ask for, by its names."""
    return {
        "tensor": Tensor,
        "parameter": Parameter,
        "list": list,
        "floating": float,
        "none": None,
        "is_neg": Tensor.is_neg,
        "increment_version": _increment_version(),
        "thread_count": torch.get_num_threads,
        "per_tensor": sys.intern("per_tensor"),
        "moments": sys.intern("moments"),
    }


def builtins_for(library: ctypes.PyDLL, behind: Mapping[str, Callable]) -> dict[str, Callable]:
    """The builtins by their names; none where they cannot be had.

    Args:
        library: the C++ library, called with the interpreter lock held.
        behind: by name, the functions that get what the builtins do not take.

    Raises:
        LibraryError: the library asks for other objects than there are here.
    """
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return {}
    names, wanted = _names(library)
    try:
        addresses = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in names]
        exchange = _exchange()
    except AttributeError:
        return {}
    if exchange is None:
        return {}
    kept = _objects()
    if set(wanted) != set(kept):
        raise LibraryError(f"the CPU library asks for {sorted(set(wanted) ^ set(kept))}: reinstall the package")
    functions = (ctypes.c_void_p * len(addresses))(*addresses)
    objects = (ctypes.py_object * len(wanted))(*[kept[name] for name in wanted])
    make = library.gac_python_call
    return {name: make(name.encode(), behind[name], functions, objects, exchange, QUICK) for name in behind}
