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

from gac_kernels.cpu.quick import QUICK

NAMES = ("moments", "pair_moments", "mix_")
"""The operations that have a builtin, by the numbers they have in C."""

_FUNCTIONS = (
    "PyCFunction_NewEx",
    "Py_IncRef",
    "Py_DecRef",
    "PyObject_Type",
    "PyObject_CallFunctionObjArgs",
    "PyObject_Call",
    "PyList_Size",
    "PyList_GetItem",
    "PyTuple_New",
    "PyTuple_SetItem",
    "PyTuple_Size",
    "PyTuple_GetItem",
    "PyDict_New",
    "PyDict_SetItem",
    "PyFloat_AsDouble",
    "PyLong_AsLong",
    "PyObject_IsTrue",
    "PyErr_Clear",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)
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


def builtins_for(library: ctypes.PyDLL, behind: Mapping[str, Callable]) -> dict[str, Callable]:
    """The builtins by the names of the operations; none where they cannot be had.

    Args:
        library: the C++ library, called with the interpreter lock held.
        behind: by name, the functions that get what the builtins do not take.
    """
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return {}
    try:
        addresses = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _FUNCTIONS]
        exchange = _exchange()
    except AttributeError:
        return {}
    if exchange is None:
        return {}
    functions = (ctypes.c_void_p * len(addresses))(*addresses)
    kept = (Tensor, Parameter, list, float, None)
    kept += (Tensor.is_neg, _increment_version(), torch.get_num_threads)
    kept += (sys.intern("per_tensor"), sys.intern("moments"))
    objects = (ctypes.py_object * len(kept))(*kept)
    make = library.gac_python_call
    make.restype = ctypes.py_object
    make.argtypes = (ctypes.c_int, ctypes.py_object, *[ctypes.c_void_p] * 3, ctypes.c_int64)
    return {name: make(k, behind[name], functions, objects, exchange, QUICK) for k, name in enumerate(NAMES)}
