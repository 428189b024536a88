"""Writes the kernels as the `kernels` package of Hugging Face loads them: ``python -m gac_kernels.hub FOLDER``.

There a kernel is a folder ``build/<variant>`` that is imported under a name of its own, from outside the path, maybe in
several versions at once (kernels 0.17: "portable, unique, compatible"). So the copy imports itself by relative names,
and registers its operators under a name that no other version has. Triton compiles on the user's machine, which makes
the variants ``torch-cuda`` and ``torch-cpu`` alike for all versions of torch; the C++ library is left out, and CPU
tensors are served by plain torch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
NAME = PACKAGE.name
BACKENDS = ("cuda", "cpu")
INTERFACE = 1
"""Version of the kernel's interface, as the hub counts it: whole numbers, one for each change that breaks callers."""

_FROM = re.compile(rf"^(\s*)from {NAME}(?:\.([\w.]+))? import ", re.MULTILINE)
_OPERATORS = re.compile(rf"torch\.ops\.{NAME}\b|(?<=Library\(\"){NAME}(?=\")|(?<=f\"){NAME}(?=::)")


def relative(source: str, depth: int, operators: str) -> str:
    """The text of a module, with relative imports of the package and operators of another name.

    Args:
        source: of the module. depth: folders of the package that it lies in, 0 for the package's own.
        operators: what ``torch.ops`` gets them under.
    """
    dots = "." * (depth + 1)
    source = _FROM.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", source)
    return _OPERATORS.sub(lambda found: found[0].replace(NAME, operators), source)


def modules() -> dict[str, str]:
    """Modules of the package by their place in it, with their texts; this one is not needed there."""
    paths = sorted(path for path in PACKAGE.rglob("*.py") if path != Path(__file__))
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in paths}


def write(folder: Path) -> str:
    """Writes ``build/torch-cuda`` and ``build/torch-cpu`` into a folder; returns the name that is registered.

    Raises:
        FileExistsError: there is a ``build`` already.
    """
    texts = modules()
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:12]
    identity = f"{NAME}_{digest}"
    build = folder / "build"
    build.mkdir(parents=True)
    for backend in BACKENDS:
        variant = build / f"torch-{backend}"
        for place, text in texts.items():
            path = variant / place
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(relative(text, place.count("/"), identity))
        told = {
            "name": NAME.replace("_", "-"),
            "id": identity,
            "version": INTERFACE,
            "license": "Apache-2.0",
            "python-depends": ["einops"],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(told, indent=2) + "\n")
    licence = PACKAGE.parent / "LICENSE"
    if licence.exists():
        shutil.copy(licence, folder)
    return identity


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=f"python -m {NAME}.hub", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="of the repository; must have no build yet")
    folder = parser.parse_args(arguments).folder
    try:
        print(f"{write(folder)} in {folder / 'build'}")
    except FileExistsError:
        parser.error(f"{folder / 'build'} is there already: name another folder, or remove it")


if __name__ == "__main__":
    main()
