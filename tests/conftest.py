"""Fixtures that several test files share."""

import sys
import textwrap

import pytest


@pytest.fixture
def install(tmp_path, monkeypatch):
    """``install("dist-name", source)`` puts a package on sys.path that importlib.metadata knows.

    The entry point is called ``entry``, by default the first word of the distribution's name.
    """
    modules = []
    monkeypatch.syspath_prepend(tmp_path)

    def write(dist, source, *, entry=None, version="1.0"):
        module = f"fake_{dist.replace('-', '_')}"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[pi2]\n{entry or dist.split('-')[0]} = {module}\n")
        return module

    yield write
    for module in modules:
        sys.modules.pop(module, None)
