"""Builtin functions for plain calls, made by the C++ library at run time; see ``csrc/python_calls.cpp``.

They take what is plain (CPU tensors or lists of them, contiguous, of type ``Tensor`` or ``Parameter``) and return
``NotImplemented``, with nothing done, for everything else. Where they cannot be had (a Python other than CPython, or one
without the global lock; torch before 2.10, which has no exchange interface) stand-ins refuse every call.
"""

from __future__ import annotations

import ctypes
import sys
import sysconfig
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn import Parameter

QUICK = 49_152
"""Elements up to which a call runs on the caller's thread, with the interpreter lock held: a second thread would save
less than waking it takes (1 to 3 us where it waits actively)."""

NAMES = ("moments", "pair_moments", "mix_")
"""In the order of the C function's numbers."""

_FUNCTIONS = (
    "PyCFunction_NewEx",
    "Py_IncRef",
    "Py_DecRef",
    "PyObject_Type",
    "PyObject_CallFunctionObjArgs",
    "PyList_Size",
    "PyList_GetItem",
    "PyTuple_New",
    "PyTuple_SetItem",
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
    except TypeError:
        return graph.increment_version
    return inner if scratch._version > before else graph.increment_version


def _refuse(*arguments):
    """Stands in for a builtin that cannot be had."""
    return NotImplemented


def plain_calls(library: ctypes.PyDLL) -> dict[str, Callable]:
    """The builtins by the names of their operations, or their stand-ins.

    ``moments(x)``, ``pair_moments(a, b)``, ``mix_(a, b, mu, moments)``: one tensor (each) or a list. Results are those of
    the operations for the whole list.
    """
    stand_ins = dict.fromkeys(NAMES, _refuse)
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return stand_ins
    try:
        addresses = [ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value for name in _FUNCTIONS]
        exchange = _exchange()
    except AttributeError:
        return stand_ins
    if exchange is None:
        return stand_ins
    functions = (ctypes.c_void_p * len(addresses))(*addresses)
    kept = (Tensor, Parameter, list, float, None, NotImplemented)
    kept += (Tensor.is_neg, _increment_version(), torch.get_num_threads)
    objects = (ctypes.py_object * len(kept))(*kept)
    make = library.gac_python_call
    make.restype = ctypes.py_object
    make.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    return {name: make(k, functions, objects, exchange, QUICK) for k, name in enumerate(NAMES)}
