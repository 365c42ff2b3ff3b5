"""The neuron cache against a dictionary, with every policy; how memory is measured and parsed."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from pi2.builtin.lru_policy import LruPolicy
from pi2.memory import aligned_bytes, give_back_unused, parse_bytes, rss_bytes, rss_peak_bytes
from pi2.neuron_cache import NeuronCache, hottest
from pi2.plugins import Plugins
from pi2.powers import SlotState

FFNS, NEURONS, STRIDE = 3, 20, 64
POLICIES = Plugins.installed().of("cache_policies")
ids = st.lists(st.integers(0, NEURONS - 1), unique=True).map(lambda n: np.array(sorted(n), np.int32))
ffn_numbers = st.integers(0, FFNS - 1)


class CacheMachine(RuleBasedStateMachine):
    """Every slot that is PRESENT must hold the bytes of its neuron, whatever was done before."""

    policy: type
    hot = 4

    def __init__(self):
        super().__init__()
        self.touched, self.told = set(), True
        self.most = NEURONS + self.hot + 3
        self.cache = NeuronCache(FFNS, NEURONS, STRIDE, self.most, self.policy.open())
        slots = self.cache.keep(np.arange(self.hot, dtype=np.int64))
        self.fill(0, np.arange(self.hot, dtype=np.int32), slots)

    def fill(self, ffn, neurons, slots):
        """What a pipeline does: read what is not there."""
        absent = self.cache.states[slots] != SlotState.PRESENT
        self.cache.slab[slots[absent]] = self.bytes_of(ffn, neurons[absent])
        self.cache.states[slots[absent]] = SlotState.PRESENT

    def bytes_of(self, ffn, neurons):
        return np.repeat(neurons[:, None] + ffn * NEURONS, STRIDE, axis=1).astype(np.uint8)

    @rule()
    def tell(self):
        self.cache.tell()
        self.told = True

    @rule(ffn=ffn_numbers, neurons=ids, fails=st.booleans())
    def use(self, ffn, neurons, fails):
        slots = self.cache.acquire(ffn, neurons)
        self.told = False
        assert len(np.unique(slots)) == len(neurons)
        assert np.array_equal(self.cache.slots(ffn, neurons), slots)
        there = self.cache.states[slots] == SlotState.PRESENT
        assert np.array_equal(self.cache.slab[slots[there]], self.bytes_of(ffn, neurons[there]))
        if not fails:  # else a read failed: the slots stay EMPTY
            self.fill(ffn, neurons, slots)

    @rule(ffn=ffn_numbers, neurons=ids, spared=ids)
    def guess(self, ffn, neurons, spared):
        spare = self.cache.slots((ffn + 1) % FFNS, spared)
        before = {slot: self.cache.slab[slot, 0] for slot in spare[spare >= 0].tolist()}
        admitted, slots = self.cache.admit(ffn, neurons, spare)
        assert set(admitted.tolist()) <= set(neurons.tolist())
        assert not set(slots.tolist()) & set(before), "a slot in use was given away"
        self.fill(ffn, admitted, slots)

    @rule(ffn=ffn_numbers, neurons=ids)
    def drop(self, ffn, neurons):
        slots = self.cache.slots(ffn, neurons)
        self.cache.drop(slots[slots >= self.hot])

    @rule(less=st.integers(0, 3))
    def resize(self, less):
        self.cache.resize(self.most - less)

    @invariant()
    def tables_agree(self):
        cache = self.cache
        seated = [(f, n, int(cache.slots(f, np.array([n]))[0])) for f in range(FFNS) for n in range(NEURONS)]
        seated = [(f, n, slot) for f, n, slot in seated if slot >= 0]
        assert len({slot for *_, slot in seated}) == len(seated) == cache.resident
        assert all(slot < cache.capacity for *_, slot in seated)
        assert [slot for f, n, slot in seated if f == 0 and n < self.hot] == list(range(self.hot))
        cold = {f * NEURONS + n for f, n, slot in seated if slot >= self.hot}
        known = set(cache.policy.victims(0, 10**6).tolist())
        assert known <= cold
        assert known == cold or not self.told
        self.touched = {s for s in self.touched | {slot for *_, slot in seated} if s < cache.capacity}
        assert cache.untouched == cache.capacity - len(self.touched)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
def test_a_slot_always_holds_its_own_neuron(policy):
    machine = type("Machine", (CacheMachine,), {"policy": policy})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, deadline=None))


def test_the_least_recently_used_neurons_leave_first():
    cache = NeuronCache(2, 4, STRIDE, 6, LruPolicy())
    first = np.array([0, 1, 2, 3], np.int32)
    cache.acquire(0, first)
    cache.acquire(1, np.array([0, 1], np.int32))
    cache.acquire(0, np.array([1], np.int32))
    cache.acquire(1, np.array([2, 3], np.int32))  # takes the places of 0 and 2 of FFN 0
    assert cache.slots(0, first).tolist()[::2] == [-1, -1]
    assert (cache.slots(0, np.array([1, 3], np.int32)) >= 0).all()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=list(POLICIES))
@given(st.lists(st.floats(0, 1, width=32), min_size=NEURONS, max_size=NEURONS), ids, ids)
def test_a_cache_that_was_reset_knows_what_it_was_told_at_first(policy, prior, before, after):
    cache, fresh = (
        NeuronCache(1, NEURONS, STRIDE, NEURONS, policy.open(), prior=np.array(prior, np.float32))
        for _ in range(2)
    )
    cache.acquire(0, before)
    cache.reset()
    for each in (cache, fresh):
        each.acquire(0, after)
        each.tell()
    for n in range(NEURONS + 1):
        assert np.array_equal(cache.policy.victims(0, n), fresh.policy.victims(0, n))


def test_slots_are_aligned_to_pages_and_take_memory_only_when_used():
    before = rss_bytes()
    cache = NeuronCache(1, 1 << 14, 4096, 1 << 14, LruPolicy())
    assert cache.slab.ctypes.data % 4096 == 0
    assert rss_bytes() - before < cache.slab.nbytes // 4
    cache.slab[:] = 1
    assert rss_bytes() - before > cache.slab.nbytes // 2
    cache.resize(0)
    assert rss_bytes() - before < cache.slab.nbytes // 4


@given(st.lists(st.integers(0, 5), min_size=6, max_size=6), st.integers(0, 8))
def test_the_hottest_are_the_most_often_active(counts, n):
    keys = hottest(np.array(counts, np.int64).reshape(2, 3), n)
    chosen = sorted((counts[k] for k in keys.tolist()), reverse=True)
    assert chosen == [c for c in sorted(counts, reverse=True)[:n] if c]
    assert keys.tolist() == sorted(set(keys.tolist()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2G", 2 * 10**9), ("1.5gb", 1_500_000_000), ("512MiB", 512 << 20), ("700000", 700_000), ("1 K", 1000)],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "G", "-1G", "2X", "0", "nan", "inf", "2iB", "1e400"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError):  # noqa: PT011  whatever float() says
        parse_bytes(text)


def test_the_resident_set_grows_with_what_is_touched():
    before = rss_bytes()
    block = np.ones(32 << 20, np.uint8)
    assert rss_bytes() - before > block.nbytes // 2
    assert rss_peak_bytes() >= rss_bytes() - (4 << 20)
    del block
    give_back_unused()
    assert rss_bytes() - before < 16 << 20


def test_the_peak_of_a_process_does_not_begin_with_that_of_its_parent():
    block = np.ones(400 << 20, np.uint8)
    program = "from pi2.memory import rss_peak_bytes; print(rss_peak_bytes())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert 1 << 20 < int(done.stdout) < block.nbytes


@given(st.integers(0, 1 << 16))
def test_buffers_are_aligned_to_pages(nbytes):
    buffer = aligned_bytes(nbytes)
    assert buffer.shape == (nbytes,)
    assert buffer.ctypes.data % 4096 == 0
    buffer[:] = 1
