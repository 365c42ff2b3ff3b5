"""What the built-in implementations promise beyond their contracts (those are in test_conformance.py)."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2 import builtin
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.builtin.lru_policy import LruPolicy
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.errors import StorageError
from pi2.plugins import KINDS, Plugins
from pi2.powers import SupportsView
from pi2.tensor import DTYPES, Tensor


def test_the_built_ins_come_through_the_same_hooks_as_strangers():
    plugins = Plugins()
    plugins.add("builtin", builtin)
    assert plugins.hooks_of("builtin") == sorted(f"pi2_{kind}" for kind in KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_there_is_a_built_in_of_every_kind_that_runs_anywhere(kind):
    plugins = Plugins()
    plugins.add("builtin", builtin)
    scores = {cls.probe().score for cls in plugins.of(kind).values()}
    assert max(scores) == 10  # below everything that was written to be fast
    assert min(scores) > 0


def test_only_a_lossless_predictor_is_chosen_without_being_named():
    plugins = Plugins()
    plugins.add("builtin", builtin)
    assert plugins.pick("predictors") is ExactPredictor
    lossless = {name for name, cls in plugins.of("predictors").items() if cls.lossless}
    assert lossless == {"exact"}


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 20), unique=True, max_size=8), max_size=10),
    st.lists(st.integers(0, 20), unique=True, max_size=3),
)
def test_lru_gives_up_in_order_of_last_use(touches, gone):
    policy, last_use, at = LruPolicy(), {}, 0
    for keys in touches:
        policy.touch(0, np.array(keys, np.int64))
        for key in keys:
            at += 1
            last_use[key] = at
    policy.evicted(np.array(gone, np.int64))  # of those not resident, too
    for key in gone:
        last_use.pop(key, None)
    assert policy.victims(0, 100).tolist() == sorted(last_use, key=last_use.get)


def test_lru_orders_the_neurons_of_all_ffns_together():
    policy = LruPolicy()
    for ffn, key in ((0, 5), (1, 105), (2, 205), (0, 6)):
        policy.touch(ffn, np.array([key], np.int64))
    assert policy.victims(0, 3).tolist() == [5, 105, 205]


def test_the_mmap_tier_gives_views_without_copying(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10_000))
    with (tmp_path / "file").open("r+b") as writer:
        tier = MmapTier.open()
        assert isinstance(tier, SupportsView)
        view = tier.view(tier.open_file(tmp_path / "file"), 4096, 3)
        writer.seek(4097)
        writer.write(b"\7")
        writer.flush()
        assert view.tolist() == [0, 7, 0]


def flags_of(address):
    """What the system knows of the mapping at ``address``, as /proc/self/smaps abbreviates it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(place[1], 16) <= address < int(place[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("nothing is mapped there")


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here")
def test_the_mmap_tier_asks_for_huge_pages(tmp_path):
    (tmp_path / "file").write_bytes(bytes(10_000))
    tier = MmapTier.open()
    view = tier.view(tier.open_file(tmp_path / "file"), 0, 10_000)
    assert "hg" in flags_of(view.ctypes.data)


def test_the_mmap_tier_names_what_was_wanted_and_what_there_is(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100))
    tier = MmapTier.open()
    file = tier.open_file(tmp_path / "file")
    with pytest.raises(StorageError, match="at byte 90: 20 bytes wanted, the file has 100") as refusal:
        tier.view(file, 90, 20)
    assert "convert the model again" in refusal.value.hint
    (tmp_path / "file").write_bytes(bytes(50))
    with pytest.raises(StorageError, match="the file shrank while it was open"):
        tier.view(file, 60, 20)
    with pytest.raises(StorageError, match="No such file or directory"):
        tier.open_file(tmp_path / "missing")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_numpy_backend_holds_every_weight_as_float32(dtype):
    weight = Tensor.from_f32(np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32), dtype)
    held = NumpyBackend.open().place(weight)
    assert held.dtype == np.float32
    assert np.array_equal(held, weight.to_f32())


def test_the_numpy_backend_says_which_numpy_it_is():
    assert np.__version__ in NumpyBackend.probe().reason


def test_the_exact_predictor_leaves_the_choice_to_the_gate():
    assert ExactPredictor.lossless
    assert ExactPredictor.open().predict(0, np.zeros((1, 4), np.float32)) is None
