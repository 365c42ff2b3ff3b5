"""What tells the built-in cache policies apart; what they share is in the conformance kit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.builtin.clock_policy import ClockPolicy
from pi2.builtin.key_table import KeyTable
from pi2.builtin.lfu_policy import LfuPolicy
from pi2.builtin.lru_policy import LruPolicy
from pi2.builtin.quota_policy import QuotaPolicy
from pi2.builtin.s3fifo_policy import S3FifoPolicy
from pi2.builtin.window_policy import WindowPolicy
from pi2.errors import OptionError

TRACE = st.lists(st.lists(st.integers(0, 12), unique=True, min_size=1, max_size=5), max_size=40)


def keys(*numbers):
    return np.array(numbers, np.int64)


def misses(policy, trace, room):
    """How often a cache of ``room`` keys has to read, one key after the other."""
    resident, missed = set(), 0
    for key in trace:
        if key not in resident:
            missed += 1
            if len(resident) == room:
                victim = policy.victims(0, 1)
                policy.evicted(victim)
                resident.remove(int(victim[0]))
            resident.add(key)
        policy.touch(0, keys(key))
    return missed


@given(TRACE, st.integers(1, 9))
@settings(deadline=None)
def test_clock_does_what_a_ring_with_one_hand_does(batches, room):
    policy, ring, used = ClockPolicy(), [], set()
    for key in (key for batch in batches for key in batch):
        if key in ring:
            used.add(key)
        else:
            if len(ring) == room:
                while ring[0] in used:
                    used.remove(ring[0])
                    ring.append(ring.pop(0))
                # when all were used, the hand came round: the first is unused by now
                assert policy.victims(0, 1).tolist() == [ring[0]]
                policy.evicted(keys(ring.pop(0)))
            ring.append(key)
        policy.touch(0, keys(key))


def test_lfu_keeps_what_is_used_often_and_forgets_old_fame():
    policy = LfuPolicy(half_life=4)
    for _ in range(6):
        policy.touch(0, keys(1))
    policy.touch(0, keys(2, 3))
    assert policy.victims(0, 2).tolist() == [2, 3]
    for _ in range(30):
        policy.touch(0, keys(2))
    assert policy.victims(0, 3).tolist() == [3, 1, 2]


@given(
    st.lists(st.lists(st.integers(0, 12), unique=True, max_size=6), min_size=1, max_size=40),
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0]), min_size=13, max_size=13),
    st.integers(1, 20),
    st.integers(0, 12),
)
@settings(deadline=None)
def test_lfu_names_the_least_of_prior_and_uses_that_fade(tokens, shares, half_life, n):
    """By a slow twin that lets every score fade at every token; float32 decides nothing of 1e-4."""
    policy, fade = LfuPolicy(half_life=half_life), 2 ** (-1 / half_life)
    prior = np.array(shares) / (1 - fade)
    policy.expect(keys(*range(13)), np.array(shares, np.float32))
    recent, here = prior.copy(), set()
    for used in tokens:
        recent *= fade
        recent[used] += 1
        policy.touch(0, keys(*used))
        here |= set(used)
        score = recent + prior
        victims = policy.victims(0, n).tolist()
        assert len(victims) == min(n, len(here))
        assert np.all(np.diff(score[victims]) > -1e-4)
        stay = here - set(victims)
        if stay and victims:
            assert score[victims].max() < min(score[list(stay)]) + 1e-4
        policy.evicted(keys(*victims))  # their uses are remembered
        here -= set(victims)


@given(TRACE, st.lists(st.integers(0, 12), unique=True, max_size=5))
@settings(deadline=None)
def test_lfu_counts_a_guess_only_once_it_is_used(batches, guessed):
    plain, guessing = LfuPolicy(), LfuPolicy()
    for batch in batches:
        plain.touch(0, keys(*batch))
        guessing.guessed(keys(*guessed))
        guessing.touch(0, keys(*batch))
    used = set().union(*batches)
    guessing.evicted(keys(*(set(guessed) - used)))
    assert guessing.victims(0, 13).tolist() == plain.victims(0, 13).tolist()


def test_lfu_goes_on_for_ever_and_with_several_ffns_a_token_is_a_round():
    policy = LfuPolicy(half_life=1)
    for _ in range(200):  # the unit would be 2^200
        policy.touch(0, keys(1))
        policy.touch(0, keys(2))
        policy.touch(1, keys(11))
    assert np.isfinite(policy._scores).all()
    assert set(policy.victims(0, 9).tolist()) == {1, 2, 11}
    policy.touch(0, keys(2))
    assert policy.victims(0, 3).tolist()[-1] == 2


def test_s3fifo_is_not_flushed_by_what_is_used_once():
    often = list(range(10))
    trace = often * 4 + [key for i in range(60) for key in (100 + i, often[i % 10])]
    assert misses(S3FifoPolicy(small=0.3), trace, 14) < misses(LruPolicy(), trace, 11)
    assert misses(S3FifoPolicy(small=0.3), trace, 14) <= 10 + 60 + 10


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60), st.integers(0, 30))
@settings(deadline=None)
def test_quotas_level_the_ffns(uses, n):
    policy, resident = QuotaPolicy(), {ffn: [] for ffn in range(4)}
    for ffn, neuron in uses:
        key = ffn * 10 + neuron
        policy.touch(ffn, keys(key))
        if key in resident[ffn]:
            resident[ffn].remove(key)
        resident[ffn].append(key)
    gone = set(policy.victims(0, n).tolist())
    left = {ffn: [key for key in order if key not in gone] for ffn, order in resident.items()}
    assert all(order[len(order) - len(left[ffn]) :] == left[ffn] for ffn, order in resident.items())
    gave = [len(left[ffn]) for ffn in left if len(left[ffn]) < len(resident[ffn])]
    assert not gave or max(len(order) for order in left.values()) <= min(gave) + 1


@given(TRACE, st.integers(0, 3))
@settings(deadline=None)
def test_a_window_leaves_behind_what_its_last_tokens_did_not_use(batches, tokens):
    policy, last = WindowPolicy(tokens), {}
    for now, batch in enumerate(batches):
        gone = {key for key, when in last.items() if when < now - tokens}
        assert set(policy.expire(0).tolist()) == gone
        policy.evicted(keys(*gone))
        assert len(policy.expire(1)) == 0  # another FFN's clock
        last = {key: when for key, when in last.items() if key not in gone} | dict.fromkeys(batch, now)
        policy.touch(0, keys(*batch))
        assert set(policy.victims(0, 99).tolist()) == set(last)


def test_lru_forgets_its_log_of_uses():
    policy = LruPolicy()
    for _ in range(3000):
        policy.touch(0, keys(1, 2, 3, 4, 5))
    assert policy._order._logged < 6000
    assert policy.victims(0, 2).tolist() == [1, 2]


@given(st.lists(st.integers(0, 1 << 45), max_size=40))
@settings(deadline=None)
def test_every_key_has_an_index_of_its_own_for_ever(numbers):
    table, seen = KeyTable(), {}
    for number in [*numbers, *range(4090, 4100), *numbers]:
        at = int(table.index(keys(number))[0])
        assert seen.setdefault(number, at) == at < table.size
    assert len(set(seen.values())) == len(seen)


@pytest.mark.parametrize(
    ("policy", "options"),
    [(LfuPolicy, {"half_life": 0}), (S3FifoPolicy, {"small": 0}), (WindowPolicy, {"tokens": -1})],
)
def test_options_out_of_range_are_refused(policy, options):
    with pytest.raises(OptionError, match="cannot"):
        policy(**options)
