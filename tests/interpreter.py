"""Makes Triton's interpreter quicker, with the same results.

- At every call of a device function it looks through all attributes of its language for the built-in ones, to replace
  them, and it does so again where they have been replaced already. That is half of a test's time.
- Sums and products of integers are computed once more, wider, to find overflows, which are told in debug mode alone: a
  third of what is left.
- The dtype in numpy of each value is looked up in a table that is built anew.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import ModuleType

from triton import language
from triton.language import core
from triton.runtime import interpreter


@functools.cache
def _names_of_builtins(place: object) -> tuple[str, ...]:
    return tuple(name for name, member in inspect.getmembers(place) if core.is_builtin(member))


class _QuickInspect:
    """``inspect`` for the interpreter, which asks `getmembers` for built-ins alone."""

    def __getattr__(self, name: str) -> object:
        return getattr(inspect, name)

    @staticmethod
    def getmembers(place: object) -> list[tuple[str, object]]:
        return [(name, getattr(place, name)) for name in _names_of_builtins(place)]


@functools.cache
def _languages(function: Callable) -> tuple[ModuleType, ...]:
    """What the interpreter replaces built-ins of: the language under the names that a function's module has for it."""
    return tuple({id(v): v for v in function.__globals__.values() if v is language or v is core}.values())


def quicken() -> None:
    """Replaces what the interpreter looks up; call it before anything has run, when no built-in has been replaced."""
    replace, scope = interpreter._patch_lang, getattr(interpreter, "_LangPatchScope", lambda: None)

    def replace_once(function: Callable) -> object:
        if any(core.is_builtin(place.arange) for place in _languages(function)):
            return replace(function)
        return scope()  # a device function in a kernel: everything is replaced until the kernel ends

    interpreter._patch_lang = replace_once
    interpreter.inspect = _QuickInspect()
    numpy_dtype = interpreter._get_np_dtype
    of_plain = functools.cache(numpy_dtype)

    def of(dtype: core.dtype) -> object:
        element = dtype.scalar
        return numpy_dtype(element) if element.is_ptr() else of_plain(element)  # types of pointers have no hash

    interpreter._get_np_dtype = of
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
