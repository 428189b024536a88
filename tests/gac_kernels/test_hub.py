"""The kernels as a folder that is loaded from outside the path, under another name, beside the installed package."""

import importlib.util
import json
import sys
import types

import pytest
import torch

import gac_kernels
from gac_kernels import fallback, hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hub") / "kernel"


@pytest.fixture(scope="module")
def identity(folder):
    return hub.write(folder)


@pytest.fixture(scope="module")
def kernel(folder, identity):
    """Imported as the package `kernels` (0.17) does it."""
    variant = folder / "build" / "torch-cpu"
    told = json.loads((variant / "metadata.json").read_text())
    assert told["id"] == identity
    assert told["backend"] == {"type": "cpu"}
    spec = importlib.util.spec_from_file_location(told["id"], variant / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[told["id"]] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.partition(".")[0] == identity]:
        del sys.modules[name]


def test_it_gives_what_the_package_gives(kernel):
    xs = [torch.randn(300, 7), torch.randn(5, dtype=torch.float64), torch.randn(0)]
    assert kernel.moments is not gac_kernels.moments
    assert torch.equal(kernel.moments(xs), fallback.moments(xs))
    found = []
    for library, sketch in ((kernel, kernel.sketch), (gac_kernels, fallback.sketch)):
        layout = library.SketchLayout.per_tensor([x.numel() for x in xs], size=64, seed=3)
        out = torch.zeros(layout.size)
        sketch(xs, out, layout=layout)
        found.append(out)
    assert found[0].norm() > 0
    assert torch.equal(*found)


def test_its_operators_have_a_name_of_their_own(kernel, identity):
    compiled = torch.compile(lambda x: kernel.moments([x]) + 1, backend="eager", fullgraph=True)
    assert compiled(torch.arange(5.0)).tolist() == [31.0, 1.0]
    assert hasattr(getattr(torch.ops, identity), "moments")


def test_nothing_of_it_comes_from_the_package(kernel, identity):
    importlib.import_module(f"{identity}.triton")
    assert not kernel.backend_status()["cpu_library"].count("'available': True"), "the C++ library stays behind"
    own = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == identity}
    assert len(own) > 20
    for name, module in own.items():
        for value in vars(module).values():
            origin = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "") or ""
            assert origin.partition(".")[0] != "gac_kernels", (name, origin)


def test_variants_differ_by_their_backend_alone(folder, identity, capsys):
    cuda, cpu = (folder / "build" / f"torch-{backend}" for backend in ("cuda", "cpu"))
    places = sorted(path.relative_to(cpu) for path in cpu.rglob("*.py"))
    assert places == sorted(path.relative_to(cuda) for path in cuda.rglob("*.py"))
    assert all((cpu / place).read_text() == (cuda / place).read_text() for place in places)
    assert (folder / "LICENSE").exists()
    with pytest.raises(SystemExit):
        hub.main([str(folder)])
    assert "build is there already" in capsys.readouterr().err
    hub.main([str(folder / "again")])
    assert identity in capsys.readouterr().out


def test_imports_are_rewritten_by_depth():
    text = "from gac_kernels import a\n    from gac_kernels.b.c import d\n"
    assert hub.relative(text, 0, "x") == "from . import a\n    from .b.c import d\n"
    assert hub.relative(text, 1, "x") == "from .. import a\n    from ..b.c import d\n"
    text = 'torch.ops.gac_kernels.f; Library("gac_kernels", "DEF"); f"gac_kernels::{n}"; see :mod:`gac_kernels.f`'
    assert hub.relative(text, 0, "x") == 'torch.ops.x.f; Library("x", "DEF"); f"x::{n}"; see :mod:`gac_kernels.f`'
