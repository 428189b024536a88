"""The order of the packages: nobody imports upwards, in a circle, or what another package keeps to itself."""

import ast
import dataclasses
import functools
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.order import ALLOWED_UPWARDS, FLOORS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gac_kernels", "gac", "benchmarks")


@dataclasses.dataclass(frozen=True)
class Import:
    """One import, wherever it stands: at the top, in a function, for types, or by ``import_module("a.b")``.

    Attributes:
        importer, module: names of both.
        name: what is taken from `module`; None for the module itself.
    """

    importer: str
    module: str
    name: str | None = None


def read(root: Path) -> dict[str, ast.Module]:
    """Every module of the packages under `root` by its name, parsed; a package is named as its ``__init__``."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {_name(path, root): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def _name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path, modules: dict[str, ast.Module]) -> list[Import]:
    """All imports among the packages. The face of a package, which Python runs before its modules, is not counted."""
    found = []
    for importer, tree in modules.items():
        is_package = (root / importer.replace(".", "/") / "__init__.py").exists()
        for node in ast.walk(tree):
            for module, name in _imported(node, importer, is_package):
                inside = f"{module}.{name}"
                found.append(Import(importer, inside) if inside in modules else Import(importer, module, name))
    return [one for one in found if one.module.split(".")[0] in PACKAGES]


def _imported(node: ast.AST, importer: str, is_package: bool) -> Iterator[tuple[str, str | None]]:
    """``(module, name)`` of a statement, if it is an import."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parts = importer.split(".")
        above = parts[: len(parts) - node.level + is_package] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        yield from ((module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        if called in ("import_module", "__import__"):
            yield str(node.args[0].value), None


def place(module: str) -> tuple[int, str]:
    """Floor and entry of a module, by the most specific entry that it lies under; floor -1 where there is none."""
    entries, whole = _entries()
    under = [entry for entry in entries if module == entry or (entry in whole and module.startswith(f"{entry}."))]
    entry = max(under, key=len, default=module)
    return entries.get(entry, -1), entry


@functools.cache
def _entries() -> tuple[dict[str, int], set[str]]:
    """The floor of each entry, and the entries that stand for all that lies under them."""
    entries = {entry: floor for floor, names in enumerate(FLOORS) for entry in names}
    return entries, {entry for entry in entries if not any(other.startswith(f"{entry}.") for other in entries)}


def faults(root: Path) -> list[str]:
    """What breaks the order, a line each."""
    modules = read(root)
    found = [f"{module} has no floor" for module in modules if place(module)[0] < 0]
    rows = imports(root, modules)
    for row in rows:
        (mine, own), (theirs, other) = place(row.importer), place(row.module)
        if own == other:
            continue
        if theirs >= mine and (row.importer, row.module) not in ALLOWED_UPWARDS:
            found.append(f"{row.importer} imports upwards from {row.module}")
        found += [
            f"{row.importer} imports {part}, which {other} keeps to itself"
            for part in (*row.module.split("."), row.name or "")
            if _private(part)
        ]
    found += [
        f"{importer} reads {name}, which {other} keeps to itself" for importer, name, other in reached(modules, rows)
    ]
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(modules, rows)]


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def reached(modules: dict[str, ast.Module], rows: list[Import]) -> list[tuple[str, str, str]]:
    """``(importer, name, entry)`` of private names that are read off an imported module of another entry."""
    wholes: dict[str, set[str]] = {importer: set() for importer in modules}
    for row in rows:
        if row.name is None and place(row.importer)[1] != place(row.module)[1]:
            wholes[row.importer].add(row.module)
    found = []
    for importer, tree in modules.items():
        known = {name: module for module in wholes[importer] for name in _bound(tree, module)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and _private(node.attr)
                and (module := known.get(ast.unparse(node.value)))
            ):
                found.append((importer, node.attr, place(module)[1]))
    return found


def _bound(tree: ast.Module, module: str) -> Iterator[str]:
    """How a module is called where it was imported whole."""
    yield module
    last = module.rpartition(".")[2]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name == (module if isinstance(node, ast.Import) else last):
                    yield alias.asname or alias.name


def circles(modules: dict[str, ast.Module], rows: list[Import]) -> list[list[str]]:
    """The shortest circle of imports through each module that is in one, each circle once."""
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for row in rows:
        if row.module in modules and row.module != row.importer:
            arrows[row.importer].add(row.module)
    found: dict[frozenset[str], list[str]] = {}
    for module in sorted(modules):
        if circle := _way_back(module, arrows):
            found.setdefault(frozenset(circle), circle)
    return list(found.values())


def _way_back(start: str, arrows: dict[str, set[str]]) -> list[str]:
    """The shortest way from a module to itself, by a search in breadth; empty where there is none."""
    came_from: dict[str, str] = {}
    waiting = deque([start])
    while waiting:
        module = waiting.popleft()
        for other in sorted(arrows[module]):
            if other == start:
                way = [module, start]
                while way[0] != start:
                    way.insert(0, came_from[way[0]])
                return way
            if other not in came_from:
                came_from[other] = module
                waiting.append(other)
    return []


def test_the_order_holds():
    assert faults(ROOT) == []


def test_every_entry_and_exception_is_used():
    modules = read(ROOT)
    entries = [entry for names in FLOORS for entry in names]
    assert sorted(entries) == sorted(set(entries))
    assert set(entries) == {place(module)[1] for module in modules}
    rows = {(row.importer, row.module) for row in imports(ROOT, modules)}
    assert [pair for pair in ALLOWED_UPWARDS if pair not in rows] == []


HOUSE = {
    "gac/__init__.py": "from gac.mixer import Mixer",
    "gac/laws/__init__.py": "",
    "gac/laws/a.py": "import gac.statistics.step",
    "gac/laws/b.py": "from gac.laws import a\nfrom gac.statistics.step import x as _x\nprint(a._mine, _x._of_a_value)",
    "gac/mixer.py": "import math\nfrom gac.laws.b import c\ndef f():\n    from gac.report import report",
    "gac/report/report.py": "",
    "gac/statistics/step.py": "from __future__ import annotations",
    "gac/version.py": "",
    "gac_kernels/new/ops.py": "",
    "benchmarks/study/a.py": "from gac.laws import b",
}
"""A small house in order."""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, []),
        ({"gac/laws/c.py": "from gac.mixer import Mixer"}, ["gac.laws.c imports upwards from gac.mixer"]),
        (
            {"gac/laws/c.py": "def f():\n    import gac.report.report"},
            ["gac.laws.c imports upwards from gac.report.report"],
        ),
        (
            {"gac/laws/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from gac import report"},
            ["gac.laws.c imports upwards from gac"],
        ),
        ({"gac/laws/c.py": "from ..mixer import Mixer"}, ["gac.laws.c imports upwards from gac.mixer"]),
        ({"gac/laws/__init__.py": "from ..mixer import Mixer"}, ["gac.laws imports upwards from gac.mixer"]),
        (
            {"gac/laws/c.py": "import importlib\nimportlib.import_module('gac.mixer')"},
            ["gac.laws.c imports upwards from gac.mixer"],
        ),
        (
            {"gac/laws/c.py": "import gac.observe.b", "gac/observe/b.py": ""},  # two entries of one floor
            ["gac.laws.c imports upwards from gac.observe.b"],
        ),
        (
            {"gac_kernels/new/ops.py": "import benchmarks.study"},
            ["gac_kernels.new.ops imports upwards from benchmarks.study"],
        ),
        (
            {"gac/laws/a.py": "def f():\n    from gac.laws.b import x"},
            ["circle: gac.laws.a -> gac.laws.b -> gac.laws.a"],
        ),
        (
            {"gac/laws/__init__.py": "from gac.laws.a import x", "gac/laws/a.py": "from gac.laws import y"},
            ["circle: gac.laws -> gac.laws.a -> gac.laws"],
        ),
        (
            {
                "benchmarks/study/a.py": "from benchmarks.study import b",
                "benchmarks/study/b.py": "from benchmarks.study.c import x",
                "benchmarks/study/c.py": "import benchmarks.study.a\nimport benchmarks.study.d",
                "benchmarks/study/d.py": "from benchmarks.study.c import y",
            },
            [
                "circle: benchmarks.study.a -> benchmarks.study.b -> benchmarks.study.c -> benchmarks.study.a",
                "circle: benchmarks.study.c -> benchmarks.study.d -> benchmarks.study.c",
            ],
        ),
        (
            {"gac/laws/a.py": "from gac.statistics.step import _row, __doc__"},
            ["gac.laws.a imports _row, which gac.statistics keeps to itself"],
        ),
        (
            {"gac/laws/a.py": "from gac.statistics._step import row", "gac/statistics/_step.py": ""},
            ["gac.laws.a imports _step, which gac.statistics keeps to itself"],
        ),
        (
            {"gac/laws/a.py": "from gac.statistics import step as s\ns._row()"},
            ["gac.laws.a reads _row, which gac.statistics keeps to itself"],
        ),
        (
            {"gac/laws/a.py": "import gac.statistics.step\ngac.statistics.step._row()"},
            ["gac.laws.a reads _row, which gac.statistics keeps to itself"],
        ),
        ({"gac/cellar/a.py": ""}, ["gac.cellar.a has no floor"]),
        ({"gac/cellar.py": ""}, ["gac.cellar has no floor"]),
        ({"benchmarks/cellar/a.py": ""}, ["benchmarks.cellar.a has no floor"]),
    ],
)
def test_faults_are_found(files, expected, tmp_path):
    for name, text in (HOUSE | files).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert faults(tmp_path) == expected
