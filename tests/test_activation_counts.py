"""Activation counts: they merge like sums, a batch is the union of its sequences, files are checked."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activation_counts import ActivationCounts
from pi2.errors import FormatError, OptionError
from safetensors.numpy import save_file

LAYERS, NEURONS, LENGTH = 3, 5, 4


def empty(batches=(1, 2, 4), **changes):
    counts = ActivationCounts.empty("m" * 64, LAYERS, NEURONS, sequence=LENGTH, batches=batches)
    return dataclasses.replace(counts, **changes)


def counted(groups, batches=(1, 2, 4)):
    """``groups``: text -> list of activity (layers, sequences, positions, neurons)."""
    total = empty(batches)
    for text, activities in groups.items():
        for activity in activities:
            for layer, active in enumerate(activity):
                total.add(layer, active)
            total.finish_group(text, activity.shape[1])
    return total


def assert_same(a, b):
    assert (a.model, a.sequence, a.batches, a.texts) == (b.model, b.sequence, b.batches, b.texts)
    assert np.array_equal(a.counts, b.counts)
    assert np.array_equal(a.steps, b.steps)


@st.composite
def corpora(draw):
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    sizes = draw(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=2, max_size=4))
    shape = (LAYERS, 0, LENGTH, NEURONS)
    return {
        f"text {i}": [rng.random((shape[0], n, *shape[2:])) < 0.3 for n in groups]
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


def test_counts_survive_the_file(tmp_path):
    rng = np.random.default_rng(0)
    counts = counted({"a" * 64: [rng.random((LAYERS, 4, LENGTH, NEURONS)) < 0.4]})
    counts.save(tmp_path / "s")
    assert_same(ActivationCounts.load(tmp_path / "s"), counts)


def test_more_than_ten_layers_keep_their_numbers(tmp_path):
    counts = ActivationCounts.empty("m", 12, 2, sequence=1, batches=(1,))
    for layer in range(12):
        for _ in range(layer):
            counts.add(layer, np.ones((1, 1, 2), np.bool_))
    counts.steps += 12
    counts.save(tmp_path / "s")
    assert ActivationCounts.load(tmp_path / "s").counts[:, 0, 0].tolist() == list(range(12))


def test_what_does_not_go_together_is_not_merged():
    for changes in ({"model": "other"}, {"sequence": 5}, {"counts": np.zeros((1, 3, NEURONS), np.int64)}):
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


def metadata(**changes):
    good = {"format": "pi2 statistics 1", "model": "m", "sequence": "4", "batches": "[1, 2]", "texts": "{}"}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "else"}, "format is 'else'"),
        ({"texts": None}, "incomplete"),
        ({"texts": "["}, "not JSON"),
        ({"texts": '{"a": -1}'}, "impossible number"),
        ({"sequence": "true"}, "impossible number"),
        ({"batches": "3"}, "not a list"),
        ({"batches": "[2, 1]"}, "do not ascend"),
        ({"batches": "[1, 2, 4]"}, "steps is missing or malformed"),
        ({"batches": "[" * 100_000}, "incomplete or malformed"),
    ],
)
def test_a_file_with_odd_metadata_is_refused(tmp_path, changes, message):
    tensors = {"steps": np.zeros(2, np.int64), "layers.0.counts": np.zeros((2, 3), np.int64)}
    save_file(tensors, tmp_path / "s", metadata(**changes))
    with pytest.raises(FormatError, match=message) as caught:
        ActivationCounts.load(tmp_path / "s")
    assert "--output" in caught.value.hint


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"steps": None}, "steps is missing"),
        ({"layers.0.counts": None}, "a layer is missing"),
        ({"layers.11.counts": np.zeros((2, 3), np.int64)}, "a layer is missing"),
        ({"layers.0.counts": np.zeros((2, 3), np.int32)}, "malformed"),
        ({"layers.0.counts": np.zeros((3, 3), np.int64)}, "malformed"),
        ({"layers.1.counts": np.zeros((2, 4), np.int64)}, "malformed"),
        ({"layers.0.counts": np.ones((2, 3), np.int64)}, "more often than it was seen"),
        ({"layers.0.counts": np.full((2, 3), -1, np.int64)}, "more often than it was seen"),
    ],
)
def test_a_file_with_odd_tensors_is_refused(tmp_path, tensors, message):
    good = {"steps": np.zeros(2, np.int64), "layers.0.counts": np.zeros((2, 3), np.int64)}
    kept = {name: value for name, value in {**good, **tensors}.items() if value is not None}
    save_file(kept, tmp_path / "s", metadata())
    with pytest.raises(FormatError, match=message):
        ActivationCounts.load(tmp_path / "s")
