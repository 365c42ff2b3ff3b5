"""What the tier says of itself, and which options it takes."""

from pathlib import Path

import numpy as np
import pi2
import pi2_storage_ufs
import pytest
from pi2.errors import OptionError, PluginError, StorageError
from pi2.plugins import Plugins
from pi2_storage_ufs import native, tier
from pi2_storage_ufs.tier import UfsTier, uring_error

PLUGIN = Path(__file__).parent.parent


def test_it_registers_one_storage_tier_below_the_resident_one():
    plugins = Plugins()
    plugins.add("ufs", pi2_storage_ufs)
    assert plugins.of("storage_tiers") == {"ufs": UfsTier}
    assert 0 < UfsTier.probe().score < 10


def test_its_header_is_the_one_of_core():
    core = Path(pi2.__file__).parent / "include" / "pi2_abi.h"
    assert (PLUGIN / "src" / "pi2_abi.h").read_text() == core.read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"engine": "floppy"},
        {"depth": "0"},
        {"depth": "5000"},
        {"threads": "0"},
        {"block": "1000"},
        {"block": "256"},
        {"merge": "1000"},
        {"merge": "256"},
        {"gap": "-1"},
        {"deadline": "0"},
        {"deadline": "nan"},
        {"throttle": "tape"},
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_with_a_hint(options):
    with pytest.raises(OptionError) as refusal:
        UfsTier.open(options)
    assert refusal.value.hint


@pytest.mark.parametrize("engine", native.ENGINES)
def test_it_says_what_it_resolved_to(engine):
    if engine == "uring" and uring_error():
        pytest.skip("this kernel refuses io_uring")
    opened = UfsTier.open({"engine": engine, "depth": "7", "threads": "3"})
    said = opened.describe()
    opened.close()
    assert said.startswith(f"{engine} (as asked), {'depth 7' if engine == 'uring' else '3 threads'}")
    assert "SIMULATION" not in said


def test_a_throttled_tier_says_that_it_is_a_simulation():
    opened = UfsTier.open({"throttle": "ufs31"})
    assert "SIMULATION: throttled to the flash model ufs31" in opened.describe()
    opened.close()


class RefusingLibrary:
    """The library on a kernel without io_uring."""

    def __getattr__(self, name):
        return getattr(LIBRARY, name)

    def pi2_ufs_uring(self):
        return 1  # EPERM

    def pi2_ufs_open(self, options, error):
        if options._obj.engine == 0:
            error._obj.value = 1
            return None
        return LIBRARY.pi2_ufs_open(options, error)


LIBRARY = native.library()


def test_without_io_uring_it_takes_threads_and_says_why(monkeypatch):
    monkeypatch.setattr(native, "library", RefusingLibrary)
    assert "refuses io_uring: Operation not permitted" in UfsTier.probe().reason
    opened = UfsTier.open()
    assert opened.describe().startswith("threads (the kernel refuses io_uring: Operation not permitted)")
    opened.close()
    with pytest.raises(PluginError, match="refuses io_uring") as refusal:
        UfsTier.open({"engine": "uring"})
    assert "engine=threads" in refusal.value.hint


def test_without_its_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    assert UfsTier.probe() == (tier.Probe(0, UfsTier.probe().reason))
    assert "without a C++ compiler" in UfsTier.probe().reason
    with pytest.raises(PluginError, match="reader is missing") as refusal:
        UfsTier.open()
    assert "install g++" in refusal.value.hint


def test_the_library_is_missing_where_it_is_missing(monkeypatch, tmp_path):
    native.library.cache_clear()
    monkeypatch.setattr(native, "files", lambda package: tmp_path)
    assert native.library() is None
    native.library.cache_clear()


def test_a_name_that_no_file_has_is_refused():
    opened = UfsTier.open()
    with pytest.raises(StorageError, match="no file has such a name"):
        opened.open_file(Path("a\0b"))
    opened.close()


def test_a_closed_tier_refuses_everything():
    opened = UfsTier.open()
    file = opened.open_file(PLUGIN / "README.md")
    opened.close()
    assert opened.describe()
    for call in (
        opened.counts,
        opened.abi_address,
        lambda: opened.open_file(PLUGIN / "README.md"),
        lambda: opened.open_descriptor(0, 1, PLUGIN),
        lambda: opened.submit(file, np.empty((0, 2), np.int64), np.empty(0, np.uint8)),
    ):
        with pytest.raises(PluginError, match="closed"):
            call()
