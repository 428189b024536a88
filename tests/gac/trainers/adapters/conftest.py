import sys
import types

import pytest


@pytest.fixture
def package(monkeypatch):
    """Puts a stand-in for a package into ``sys.modules``: ``package({"pkg.module": {"name": value}})``."""

    def build(modules):
        for path, contents in modules.items():
            parts = path.split(".")
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in sys.modules:
                    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
                if depth > 1:
                    monkeypatch.setattr(
                        sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], sys.modules[name], raising=False
                    )
            for key, value in contents.items():
                monkeypatch.setattr(sys.modules[path], key, value, raising=False)

    return build
