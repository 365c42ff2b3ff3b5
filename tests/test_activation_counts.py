"""Activation counts: they merge like sums, and a batch is the union of its sequences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activation_counts import ActivationCounts
from pi2.activity_sketch import ActivitySketch
from pi2.errors import FormatError, OptionError

LAYERS, NEURONS, LENGTH = 3, 5, 4


def empty(batches=(1, 2, 4), **changes):
    counts = ActivationCounts.empty("m" * 64, LAYERS, NEURONS, sequence=LENGTH, batches=batches)
    return dataclasses.replace(counts, **changes)


def counted(groups, batches=(1, 2, 4)):
    """``groups``: text -> list of activity (layers, sequences, positions, neurons)."""
    total = empty(batches)
    for text, activities in groups.items():
        for activity in activities:
            group = empty(batches)
            for layer, active in enumerate(activity):
                group.add(layer, active)
                group.factors[layer] += active.sum()
            tokens = np.packbits(activity, axis=3).reshape(LAYERS, -1, 1)
            first = total.texts.get(text, 0) * LENGTH
            group.sketch = ActivitySketch.of_tokens(text, first, tokens, NEURONS)
            group.finish_group(text, activity.shape[1])
            total = total.merged(group, later=True)
    return total


def assert_same(a, b):
    assert (a.model, a.sequence, a.batches, a.texts) == (b.model, b.sequence, b.batches, b.texts)
    assert np.array_equal(a.counts, b.counts)
    assert np.array_equal(a.steps, b.steps)
    assert np.array_equal(a.repeats, b.repeats)
    assert np.array_equal(a.factors, b.factors)
    assert np.array_equal(a.sketch.keys, b.sketch.keys)
    assert np.array_equal(a.sketch.sets, b.sketch.sets)


@st.composite
def corpora(draw):
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    sizes = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=2, max_size=4))
    shape = (LAYERS, 0, LENGTH, NEURONS)
    return {
        f"{i:016x}".ljust(64, "0"): [rng.random((shape[0], n, *shape[2:])) < 0.3 for n in groups]
        for i, groups in enumerate(sizes)
    }


@settings(deadline=None, max_examples=40)
@given(corpora(), st.data())
def test_two_halves_of_a_corpus_are_the_whole(corpus, data):
    first = data.draw(st.sets(st.sampled_from(sorted(corpus))))
    a = counted({text: groups for text, groups in corpus.items() if text in first})
    b = counted({text: groups for text, groups in corpus.items() if text not in first})
    assert_same(a.merged(b), counted(corpus))
    assert_same(b.merged(a), counted(corpus))


@settings(deadline=None, max_examples=40)
@given(corpora())
def test_a_batch_is_active_where_any_of_its_sequences_is(corpus):
    found = counted(corpus)
    expected = np.zeros_like(found.counts)
    steps = np.zeros_like(found.steps)
    for activity in (group for groups in corpus.values() for group in groups):
        for k, batch in enumerate(found.batches):
            for first in range(0, activity.shape[1] - batch + 1, batch):
                for position in range(LENGTH):
                    expected[:, k] += activity[:, first : first + batch, position].any(axis=1)
                    steps[k] += 1
    assert np.array_equal(found.counts, expected)
    assert np.array_equal(found.steps, steps)
    seen = found.density[:, found.steps > 0]
    assert np.all((seen >= 0) & (seen <= 1))
    assert np.isnan(found.density[:, found.steps == 0]).all()


@settings(deadline=None, max_examples=40)
@given(corpora())
def test_repeats_are_the_active_neurons_that_were_active_one_token_before(corpus):
    repeated, later = np.zeros(LAYERS, np.int64), np.zeros(LAYERS, np.int64)
    for activity in (group for groups in corpus.values() for group in groups):
        for position in range(1, LENGTH):
            now, before = activity[:, :, position], activity[:, :, position - 1]
            later += now.sum(axis=(1, 2))
            repeated += np.logical_and(now, before).sum(axis=(1, 2))
    assert np.array_equal(counted(corpus).repeats, np.stack((repeated, later), axis=1))


def test_what_does_not_go_together_is_not_merged():
    for changes in (
        {"model": "other"},
        {"sequence": 5},
        {"activity": "else"},
        {"counts": np.zeros((1, 3, NEURONS), np.int64)},
    ):
        with pytest.raises(FormatError, match="another model"):
            empty().merged(empty(**changes))
    with pytest.raises(FormatError, match="another model"):
        empty().merged(empty((1, 2)))
    with pytest.raises(FormatError, match="in both"):
        empty(texts={"a": 1}).merged(empty(texts={"a": 1}))


@pytest.mark.parametrize("batches", [(), (2, 1), (1, 1), (0, 1), (1, 4096)])
def test_batch_sizes_that_cannot_be_are_refused(batches):
    with pytest.raises(OptionError, match="do not ascend"):
        empty(batches)
