"""The package registers, tells the truth about this machine, and does nothing else yet."""

from pathlib import Path

import numpy as np
import pi2_backend_cpu
import pytest
from pi2.errors import PluginError
from pi2.plugins import Plugins
from pi2.testing.plugin import PluginTests
from pi2_backend_cpu.backend import CpuBackend, describe_cpu


class TestCpuBackend(PluginTests):
    plugin = CpuBackend


def test_it_registers_one_backend():
    plugins = Plugins()
    plugins.add("cpu", pi2_backend_cpu)
    assert plugins.hooks_of("cpu") == ["pi2_backends"]
    assert plugins.of("backends") == {"cpu": CpuBackend}


def test_it_is_never_picked():
    plugins = Plugins()
    plugins.add("cpu", pi2_backend_cpu)
    with pytest.raises(PluginError, match="cpu cannot run here: not built yet"):
        plugins.pick("backends", "cpu")
    with pytest.raises(PluginError, match="none of the backends can run here"):
        plugins.pick("backends")


@pytest.mark.parametrize(
    ("cpuinfo", "said"),
    [
        ("model name: x\nflags\t\t: fpu avx avx2 avx512f\n", "this CPU has AVX2, AVX-512"),
        ("processor: 0\nFeatures\t: fp asimd asimddp i8mm\n", "NEON, NEON dot product, NEON int8"),
        ("flags : fpu sse2\n", "none of the planned instruction sets"),
        ("", "none of the planned instruction sets"),
    ],
)
def test_it_names_the_instruction_sets_that_the_system_lists(tmp_path, cpuinfo, said):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert said in describe_cpu(tmp_path / "cpuinfo")


def test_where_the_system_lists_nothing_it_says_so(tmp_path):
    assert "does not tell" in describe_cpu(tmp_path / "missing")
    assert describe_cpu(Path("/proc/cpuinfo")) in CpuBackend.probe().reason


def test_no_method_pretends():
    backend = object.__new__(CpuBackend)  # open() refuses, so nobody gets here
    x = np.zeros((1, 1), np.float32)
    calls = (
        lambda: backend.place(None),
        lambda: backend.linear(None, x, x),
        lambda: backend.place_ffn(None, None),
        lambda: backend.ffn(None, x, x),
    )
    for call in calls:
        with pytest.raises(PluginError, match="not built yet"):
            call()
