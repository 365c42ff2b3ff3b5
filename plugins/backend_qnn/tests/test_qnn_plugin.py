"""The package registers, tells the truth about this machine, and does nothing else yet."""

from pathlib import Path

import numpy as np
import pi2_backend_qnn
import pytest
from pi2.errors import PluginError
from pi2.plugins import Plugins
from pi2.testing.plugin import PluginTests
from pi2_backend_qnn.backend import QnnBackend, describe_npu


class TestQnnBackend(PluginTests):
    plugin = QnnBackend


def test_it_registers_one_backend():
    plugins = Plugins()
    plugins.add("qnn", pi2_backend_qnn)
    assert plugins.hooks_of("qnn") == ["pi2_backends"]
    assert plugins.of("backends") == {"qnn": QnnBackend}


def test_it_is_never_picked():
    plugins = Plugins()
    plugins.add("qnn", pi2_backend_qnn)
    with pytest.raises(PluginError, match="qnn cannot run here: not built yet"):
        plugins.pick("backends", "qnn")
    with pytest.raises(PluginError, match="none of the backends can run here"):
        plugins.pick("backends")


@pytest.mark.parametrize("device", ["fastrpc-cdsp", "adsprpc-smd"])
def test_it_says_whether_there_is_an_npu(tmp_path, device):
    assert describe_npu(tmp_path) == "this machine has no Hexagon NPU: no /dev/fastrpc-cdsp"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / device).touch()
    assert describe_npu(tmp_path) == f"this machine has a Hexagon DSP at /dev/{device}"
    assert describe_npu(Path("/")) in QnnBackend.probe().reason


def test_no_method_pretends():
    backend = object.__new__(QnnBackend)  # open() refuses, so nobody gets here
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
