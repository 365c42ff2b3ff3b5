"""The package registers, tells the truth about this machine, and does nothing else yet."""

import os
from pathlib import Path

import pi2_storage_ufs
import pytest
from pi2.errors import PluginError
from pi2.plugins import Plugins
from pi2.testing.plugin import PluginTests
from pi2_storage_ufs.tier import UfsTier, describe_io


class TestUfsTier(PluginTests):
    plugin = UfsTier


def test_it_registers_one_storage_tier():
    plugins = Plugins()
    plugins.add("ufs", pi2_storage_ufs)
    assert plugins.hooks_of("ufs") == ["pi2_storage_tiers"]
    assert plugins.of("storage_tiers") == {"ufs": UfsTier}


def test_it_is_never_picked():
    plugins = Plugins()
    plugins.add("ufs", pi2_storage_ufs)
    with pytest.raises(PluginError, match="ufs cannot run here: not built yet"):
        plugins.pick("storage_tiers", "ufs")
    with pytest.raises(PluginError, match="none of the storage tiers can run here"):
        plugins.pick("storage_tiers")


@pytest.mark.parametrize(
    ("switch", "said"),
    [("0\n", "is allowed"), ("1\n", "privileged"), ("2\n", "switched off"), ("?", "does not tell")],
)
def test_it_says_whether_io_uring_may_be_used(tmp_path, switch, said):
    assert "does not tell" in describe_io(tmp_path)
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/io_uring_disabled").write_text(switch)
    assert said in describe_io(tmp_path)
    assert describe_io(Path("/")) in UfsTier.probe().reason


def test_it_says_whether_there_is_o_direct(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "O_DIRECT", 1, raising=False)
    assert "the system has O_DIRECT" in describe_io(tmp_path)
    monkeypatch.delattr(os, "O_DIRECT")
    assert "no O_DIRECT" in describe_io(tmp_path)


def test_no_method_pretends():
    tier = object.__new__(UfsTier)  # open() refuses, so nobody gets here
    for call in (lambda: tier.open_file(Path("x")), lambda: tier.read(0, None, None)):
        with pytest.raises(PluginError, match="not built yet"):
            call()
