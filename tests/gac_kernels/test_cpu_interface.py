"""The interface of the C++ library, told by itself, against the tables that this package calls it by."""

import re
from pathlib import Path

import pytest
import torch

from gac_kernels import cpu
from gac_kernels.cpu import library, operations, tables, tokens
from gac_kernels.layout import LANES

PATH = library.library_path()
needs_library = pytest.mark.skipif(not PATH.exists(), reason="the CPU library is not built")


@needs_library
def test_a_library_that_is_there_loads():
    """Elsewhere tests are skipped where the library does not load: here that is seen."""
    assert cpu.available(), library.failure()


def test_every_function_of_the_header_is_in_the_table():
    header = Path(__file__).parents[2] / "csrc" / "gac_cpu.h"
    declared = re.findall(r"^GAC_API [\w\s*]+?(gac_\w+)\(", header.read_text(), re.MULTILINE)
    assert len(declared) > 10
    assert declared.count("gac_sketch") == 1
    assert sorted(declared) == sorted(name for name in library.INTERFACE if name.startswith("gac_"))


@needs_library
@pytest.mark.parametrize("name", [*library.INTERFACE, "gac_new"])
def test_a_library_with_another_interface_is_refused(name, monkeypatch):
    """One line here is not as it is there; of a function, the first two parameters that differ are swapped."""
    line = library.INTERFACE.get(name, "void()")
    parts = line[line.find("(") + 1 :].rstrip(")").split(", ") if line.endswith(")") else list(line)
    swaps = [k for k in range(len(parts) - 1) if parts[k] != parts[k + 1]]
    if swaps:
        first, second = parts[swaps[0] : swaps[0] + 2]
        joint = ", " if line.endswith(")") else ""
        changed = line.replace(f"{first}{joint}{second}", f"{second}{joint}{first}", 1)
    else:
        changed = line + "?"
    assert changed != line
    monkeypatch.setitem(library.INTERFACE, name, changed)
    with pytest.raises(library.LibraryError, match=r"does not fit this package.*reinstall") as error:
        library.Library(PATH)
    there = line if name != "gac_new" else "missing"
    assert f"{name} is {there} there and {changed} here" in str(error.value)


@needs_library
def test_a_library_with_more_or_without_a_table_is_refused(monkeypatch):
    with pytest.raises(library.LibraryError, match="does not tell its interface"):
        library.Library(Path(torch._C.__file__))
    monkeypatch.delitem(library.INTERFACE, "gac_mix")
    with pytest.raises(library.LibraryError, match=r"gac_mix is int\(.*\) there and missing here"):
        library.Library(PATH)


def test_what_the_operations_pack_is_as_the_table_says():
    assert operations._MAP.format == "@" + library.INTERFACE["struct gac_sketch_map"]
    assert tokens._TOKENS.format == "@" + library.INTERFACE["struct gac_tokens"]
    dtypes = [f"torch.{name}" for name in library.INTERFACE["dtypes"].split()]
    assert {str(dtype): code for dtype, code in tables.DTYPE_CODES.items()} == {d: k for k, d in enumerate(dtypes)}
    assert str(LANES) == library.INTERFACE["elements of a sum of absorb_"]
