"""Builds the CPU library from ``csrc/`` where a C++ compiler is found; everything else is in pyproject.toml.

The library is plain C++ behind a C interface, so a wheel that holds it is tied to a platform and to nothing else
(``py3-none-<platform>``). Without a compiler the package is pure Python and works, more slowly. ``CXX`` names the
compiler, ``CXXFLAGS`` and ``LDFLAGS`` are appended to its options. Nothing here looks at the CPU.

``GAC_PLATFORM`` says that ``CXX`` compiles for another machine, by the wheel's platform tag
(``manylinux_2_17_aarch64``, ``macosx_11_0_arm64``); ``make wheels`` does so.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(ROOT.joinpath("csrc").glob("*.cpp"))
PLATFORM = os.environ.get("GAC_PLATFORM", "")
SYSTEM = "darwin" if PLATFORM.startswith("macosx_") else "linux" if "linux_" in PLATFORM else sys.platform
SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(SYSTEM, "so")
LIBRARY = Path("gac_kernels", "_lib", f"libgac_cpu.{SUFFIX}")


def compiler() -> list[str] | None:
    """The C++ compiler's command; None when there is none, or none whose options are known."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    if PLATFORM:
        raise SystemExit(f"GAC_PLATFORM={PLATFORM} asks for another machine's library: set CXX to a compiler for it")
    if SYSTEM == "win32":
        return None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    return None


def commands(cxx: list[str], objects: Path, target: Path) -> tuple[list[list[str]], list[str]]:
    """Those that compile a source each, and the one that links. No -march: functions carry their instruction sets."""
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    options = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread", *flags]
    shared = ["-dynamiclib", "-install_name", f"@rpath/{target.name}"] if SYSTEM == "darwin" else ["-shared", "-ldl"]
    compiled = [str(objects / f"{source.stem}.o") for source in SOURCES]
    each = [
        [*cxx, *options, "-c", str(source.relative_to(ROOT)), "-o", file]
        for source, file in zip(SOURCES, compiled, strict=True)
    ]
    return each, [*cxx, *options, *compiled, "-o", str(target), *shared, *shlex.split(os.environ.get("LDFLAGS", ""))]


def compile_library(cxx: list[str], target: Path, announce: Callable[[str], None]) -> None:
    """Compiles on all cores, and links."""

    def run(line: list[str]) -> None:
        announce(shlex.join(line))
        subprocess.run(line, cwd=ROOT, check=True)

    with tempfile.TemporaryDirectory() as objects:
        each, link = commands(cxx, Path(objects), target)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, each))
        run(link)


class BuildLibrary(Command):
    """Compiles the library into the build folder, or in place for an editable installation."""

    description = "compile the CPU library"
    user_options = []  # noqa: RUF012
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        cxx = compiler()
        if cxx is None:
            self.warn("no C++ compiler found (set CXX): the CPU library is left out and the package is pure Python")
            return
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        # Compiled beside its place and moved there: a process that has the old one loaded keeps it.
        partial = target.with_suffix(".partial")
        try:
            compile_library(cxx, partial, lambda line: self.announce(line, level=2))
        except (OSError, subprocess.CalledProcessError) as error:
            partial.unlink(missing_ok=True)
            if os.environ.get("CXX"):  # asked for by name: a failure is not to be passed over
                raise
            self.warn(f"the CPU library does not compile and is left out: {error}")
            return
        os.replace(partial, target)

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted(ROOT.joinpath("csrc").iterdir())]

    def get_outputs(self):
        target = Path(self.build_lib) / LIBRARY
        return [str(target)] if target.exists() else []

    def get_output_mapping(self):
        return {}


class Build(build):
    """``build`` with the library."""

    sub_commands = [*build.sub_commands, ("build_library", None)]  # noqa: RUF012


class Wheel(bdist_wheel):
    """A wheel for any Python 3, tied to the platform when it holds the library."""

    def run(self):
        self.run_command("build_library")  # first: the tag depends on whether it succeeds
        self.root_is_pure = not self.get_finalized_command("build_library").get_outputs()
        super().run()

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform if self.root_is_pure else PLATFORM or platform


class BinaryDistribution(Distribution):
    """Puts the package where platform-dependent files go when it holds the library."""

    def has_ext_modules(self):
        return compiler() is not None


setup(
    cmdclass={"build": Build, "build_library": BuildLibrary, "bdist_wheel": Wheel},
    distclass=BinaryDistribution,
)
