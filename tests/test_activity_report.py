"""The figures of a report, against a slow way to compute each."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activation_counts import ActivationCounts
from pi2.activity_report import CURVE, coactivation, cumulative, describe, hot_share, overlap
from pi2.activity_sketch import ActivitySketch
from pi2.errors import FormatError

LENGTH = 16


def counts_of(activity, model="m", text="ab" * 32):
    """``activity`` (layers, sequences, LENGTH, neurons), counted in batches of 1 and 2."""
    layers, sequences, _, neurons = activity.shape
    counts = ActivationCounts.empty(model, layers, neurons, sequence=LENGTH, batches=(1, 2))
    for layer, active in enumerate(activity):
        counts.add(layer, active)
        counts.factors[layer] += (active.sum(), active.size, active.sum())
    packed = np.packbits(activity, axis=3).reshape(layers, sequences * LENGTH, -1)
    counts.sketch = ActivitySketch.of_tokens(text, 0, packed, neurons)
    counts.finish_group(text, sequences)
    return counts


def random_activity(seed, shape=(2, 4, LENGTH, 9)):
    """Neurons of very different frequency, the last one dead."""
    rng = np.random.default_rng(seed)
    frequency = rng.beta(0.5, 0.8, shape[-1])
    frequency[-1] = 0
    return rng.random(shape) < frequency


def slow_pair(active):
    shares = [
        (active[:, i] & active[:, j]).sum() / active[:, i].sum()
        for i in range(active.shape[1])
        for j in range(active.shape[1])
        if i != j and active[:, i].any()
    ]
    return np.mean(shares) if shares else None


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 32))
def test_pairs_are_what_counting_every_pair_finds(seed):
    activity = random_activity(seed)
    counts = counts_of(activity)
    found = coactivation(counts, 1)
    active = activity[1].reshape(-1, 9)
    cold = active[:, active.mean(axis=0) < 0.5]
    assert found.hot == 9 - cold.shape[1]
    for value, expected in ((found.pair, slow_pair(active)), (found.cold_pair, slow_pair(cold))):
        assert value == (None if expected is None else pytest.approx(expected))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 32))
def test_cumulative_activation_rises_from_nothing_to_all_and_bows_upwards(seed):
    counts = counts_of(random_activity(seed))
    for curve in (cumulative(counts), cumulative(counts, together=True)):
        known = curve[~np.isnan(curve[:, 0])]
        assert np.all(known[:, 0] == 0)
        assert known[:, -1] == pytest.approx(1)
        assert np.all(np.diff(known, axis=1) >= -1e-12)
        assert np.all(np.diff(known, 2, axis=1) <= 1e-9)
        assert np.all(known >= np.array(CURVE) - 1e-9)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1 << 32))
def test_density_rises_with_the_batch_and_hot_neurons_are_active_in_half_of_the_steps(seed):
    activity = random_activity(seed)
    counts = counts_of(activity)
    assert np.all(np.diff(counts.density, axis=1) >= 0)
    share = (activity.reshape(2, -1, 9).mean(axis=1) >= 0.5).mean(axis=1)
    assert hot_share(counts)[:, 0] == pytest.approx(share)


def test_friends_are_found_and_chance_makes_none():
    """Neurons 2i and 2i + 1 always fire together; then, a third of the neurons always fire."""
    rng = np.random.default_rng(3)
    tokens, neurons = 512, 60
    twins = np.repeat(rng.random((tokens, neurons // 2)) < 0.1, 2, axis=1)
    lonely = rng.random((tokens, neurons)) < 0.1
    shape = (1, tokens // LENGTH, LENGTH, neurons)
    assert coactivation(counts_of(twins.reshape(shape)), 0).friend == 1
    assert coactivation(counts_of(lonely.reshape(shape)), 0).friend < 0.2
    always = lonely.copy()
    always[:, ::3] = True
    found = coactivation(counts_of(always.reshape(shape)), 0)
    assert (found.friend, found.hot) == (1, 20)
    assert found.cold_friend < 0.2
    assert found.cold_pair == pytest.approx(0.1, abs=0.03)


def test_nothing_is_said_of_what_was_not_seen():
    found = coactivation(counts_of(np.zeros((1, 2, LENGTH, 5), np.bool_)), 0)
    assert (found.pair, found.friend, found.cold_pair, found.cold_friend, found.hot) == (*[None] * 4, 0)
    every = coactivation(counts_of(np.ones((1, 2, LENGTH, 5), np.bool_)), 0)
    assert (every.pair, every.friend, every.cold_pair, every.cold_friend, every.hot) == (1, 1, None, None, 5)


def test_a_description_is_json_and_says_nothing_for_batches_that_were_not_filled():
    described = json.loads(json.dumps(describe(counts_of(random_activity(0, (2, 1, LENGTH, 9))))))
    assert described["density"][0][1] is None
    assert described["hot_share"][0][1] is None
    assert described["up_where_gate"] == [1, 1]
    assert all(0 <= share <= 1 for share in described["repeated"])
    assert [len(described[k]) for k in ("density", "cumulative", "coactivation")] == [2, 2, 2]


def test_progress_is_heard_layer_by_layer():
    heard = []
    describe(counts_of(random_activity(1)), lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]


def test_hot_sets_overlap_with_themselves_and_not_with_their_opposite():
    ordered = np.zeros((1, 1, LENGTH, 10), np.bool_)
    for neuron in range(10):
        ordered[..., neuron:, neuron] = True
    a, b = counts_of(ordered), counts_of(ordered[..., ::-1])
    assert overlap(a, a).tolist() == [1]
    assert overlap(a, b).tolist() == [0]


def test_hot_sets_of_different_models_are_not_compared():
    activity = random_activity(0)
    with pytest.raises(FormatError, match="different models"):
        overlap(counts_of(activity), counts_of(activity, model="other"))
