"""The order of the packages: nobody imports upwards, in a circle, or what another package keeps to itself."""

import ast
from pathlib import Path

import pytest

from tests.order import ALLOWED_UPWARDS, FLOORS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("gac_kernels", "gac", "benchmarks")


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(root: Path) -> dict[str, ast.Module]:
    """Every module of the packages under ``root``, parsed."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {module_name(path, root): ast.parse(path.read_text()) for path in paths}


def imports(modules: dict[str, ast.Module]) -> list[tuple[str, str, str | None]]:
    """``(importer, module, name)`` of each import, those inside functions too; ``name`` None for a whole module."""
    found = []
    for importer, tree in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found += [(importer, alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer}: relative import"
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}"
                    found.append((importer, inside, None) if inside in modules else (importer, node.module, alias.name))
    return [row for row in found if row[1].split(".")[0] in PACKAGES]


def place(module: str) -> tuple[int, str]:
    """Floor and entry of a module: the most specific entry that it lies under."""
    entries = [(entry, floor) for floor, names in enumerate(FLOORS) for entry in names]
    under = [(entry, floor) for entry, floor in entries if module == entry or module.startswith(entry + ".")]
    entry, floor = max(under, key=lambda found: len(found[0]), default=("", -1))
    if entry == "gac" and module != "gac":
        return -1, module  # a new folder has to be given a floor
    return floor, entry


def faults(root: Path) -> list[str]:
    """What breaks the order, a line each."""
    modules = read(root)
    rows = imports(modules)
    found = [f"{module} has no floor" for module in modules if place(module)[0] < 0]
    for importer, module, name in rows:
        (mine, own), (theirs, other) = place(importer), place(module)
        if own == other:
            continue
        upwards = theirs > mine or (theirs == mine and own != other)
        if upwards and (importer, module) not in ALLOWED_UPWARDS:
            found.append(f"{importer} imports upwards from {module}")
        hidden = [part for part in (*module.split("."), name or "") if part.startswith("_") and part[:2] != "__"]
        if hidden:
            found.append(f"{importer} imports {hidden[0]}, which {other} keeps to itself")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(modules, rows)]


def circles(modules: dict[str, ast.Module], rows: list[tuple[str, str, str | None]]) -> list[list[str]]:
    """Each circle of imports, once, by a search in depth."""
    arrows: dict[str, set[str]] = {module: set() for module in modules}
    for importer, module, _ in rows:
        if module in modules and module != importer and not importer.startswith(module + "."):
            arrows[importer].add(module)
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(arrows[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in modules:
        visit(module, [])
    return found


def test_the_order_holds():
    assert faults(ROOT) == []


def test_every_entry_and_exception_is_used():
    modules = read(ROOT)
    assert [
        entry for names in FLOORS for entry in names if not any(module.startswith(entry) for module in modules)
    ] == []
    rows = {(importer, module) for importer, module, _ in imports(modules)}
    assert [pair for pair in ALLOWED_UPWARDS if pair not in rows] == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"gac/laws/a.py": "from gac.mixer import Mixer"}, "gac.laws.a imports upwards from gac.mixer"),
        ({"gac/observe/a.py": "def f():\n    import gac.laws.gac"}, "gac.observe.a imports upwards from gac.laws.gac"),
        (
            {"gac/laws/a.py": "from gac.laws import b", "gac/laws/b.py": "from gac.laws.a import x"},
            "circle: gac.laws.a -> gac.laws.b -> gac.laws.a",
        ),
        (
            {"gac/laws/a.py": "from gac.statistics.step import _row"},
            "gac.laws.a imports _row, which gac.statistics keeps to itself",
        ),
        ({"gac/cellar/a.py": ""}, "gac.cellar.a has no floor"),
    ],
)
def test_faults_are_found(files, expected, tmp_path):
    for name in ("gac/laws/b.py", "gac/laws/gac.py", "gac/mixer.py", "gac/statistics/step.py", *files):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.get(name, ""))
    assert expected in faults(tmp_path)
