"""The package registers, tells the truth about this machine, and does nothing else yet."""

from pathlib import Path

import numpy as np
import pi2_backend_opencl
import pytest
from pi2.errors import PluginError
from pi2.plugins import Plugins
from pi2.testing.plugin import PluginTests
from pi2_backend_opencl.backend import OpenclBackend, describe_drivers


class TestOpenclBackend(PluginTests):
    plugin = OpenclBackend


def test_it_registers_one_backend():
    plugins = Plugins()
    plugins.add("opencl", pi2_backend_opencl)
    assert plugins.hooks_of("opencl") == ["pi2_backends"]
    assert plugins.of("backends") == {"opencl": OpenclBackend}


def test_it_is_never_picked():
    plugins = Plugins()
    plugins.add("opencl", pi2_backend_opencl)
    with pytest.raises(PluginError, match="opencl cannot run here: not built yet"):
        plugins.pick("backends", "opencl")
    with pytest.raises(PluginError, match="none of the backends can run here"):
        plugins.pick("backends")


def test_it_names_the_drivers_that_are_registered(tmp_path):
    assert "no OpenCL driver" in describe_drivers(tmp_path)
    (tmp_path / "etc/OpenCL/vendors").mkdir(parents=True)
    assert "no OpenCL driver" in describe_drivers(tmp_path)
    (tmp_path / "etc/OpenCL/vendors/pocl.icd").touch()
    assert describe_drivers(tmp_path) == "OpenCL drivers on this machine: pocl.icd"
    (tmp_path / "vendor/lib64").mkdir(parents=True)
    (tmp_path / "vendor/lib64/libOpenCL.so").touch()
    assert describe_drivers(tmp_path).endswith("/vendor/lib64/libOpenCL.so, pocl.icd")
    assert describe_drivers(Path("/")) in OpenclBackend.probe().reason


def test_no_method_pretends():
    backend = object.__new__(OpenclBackend)  # open() refuses, so nobody gets here
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
