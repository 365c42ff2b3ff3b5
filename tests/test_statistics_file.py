"""Statistics on disk: what is written comes back, and nothing that lies comes in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activation_counts import ActivationCounts
from pi2.activity_sketch import SAMPLE, ActivitySketch, token_keys
from pi2.errors import FormatError
from pi2.statistics_file import FORMAT, Statistics
from safetensors.numpy import save_file

NEURONS = 11


def counts_of(layers=2, tokens=8):
    """Every layer l has neurons 0 ... l active for every token."""
    counts = ActivationCounts.empty("m" * 64, layers, NEURONS, sequence=tokens, batches=(1, 2))
    active = np.zeros((layers, 2, tokens, NEURONS), np.bool_)
    for layer in range(layers):
        active[layer, ..., : layer + 1] = True
        counts.add(layer, active[layer])
        counts.factors[layer] += active[layer].sum()
    packed = np.packbits(active, axis=3).reshape(layers, 2 * tokens, -1)
    counts.sketch = ActivitySketch.of_tokens("ab" * 32, 0, packed, NEURONS)
    counts.finish_group("ab" * 32, 2)
    return counts


@pytest.mark.parametrize("layers", [1, 11])
def test_statistics_survive_the_file_with_every_layer_in_its_place(tmp_path, layers):
    counts = counts_of(layers)
    Statistics(counts).save(tmp_path / "s")
    found, bare = (Statistics.load(tmp_path / "s", sample=sample).counts for sample in (True, False))
    for each in (found, bare):
        assert (each.kind, each.texts, each.tokens) == (counts.kind, counts.texts, 16)
        for name in ("counts", "steps", "repeats", "factors"):
            assert np.array_equal(getattr(each, name), getattr(counts, name)), name
    assert bare.sketch.tokens == 0
    assert np.array_equal(found.sketch.keys, counts.sketch.keys)
    assert [found.sketch.active(layer).sum() for layer in range(layers)] == [
        16 * min(layer + 1, NEURONS) for layer in range(layers)
    ]


def tensors(**changes):
    good = {
        "steps": np.array([4, 2]), "repeats": np.array([[1, 2]]), "factors": np.array([[3, 8, 2]]),
        "keys": np.array([3, 5], np.uint64), "layers.0.counts": np.ones((2, NEURONS), np.int64),
        "layers.0.sample": np.zeros((2, 2), np.uint8),
    }  # fmt: skip
    return {name: value for name, value in {**good, **changes}.items() if value is not None}


def metadata(**changes):
    good = {"format": FORMAT, "model": "m", "activity": "exact", "sequence": "4", "batches": "[1, 2]"}
    good["texts"] = '{"a": 1}'
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def test_the_file_that_the_others_are_made_from_is_sound(tmp_path):
    save_file(tensors(), tmp_path / "s", metadata())
    assert Statistics.load(tmp_path / "s").counts.tokens == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pi2 statistics 1"}, "format is 'pi2 statistics 1', not"),
        ({"texts": None}, "incomplete"),
        ({"activity": None}, "incomplete"),
        ({"texts": "["}, "not JSON"),
        ({"texts": '{"a": -1}'}, "impossible number"),
        ({"sequence": "true"}, "impossible number"),
        ({"batches": "3"}, "not a list"),
        ({"batches": "[2, 1]"}, "do not ascend"),
        ({"batches": "[1, 2, 4]"}, "steps is malformed"),
        ({"batches": "[" * 100_000}, "incomplete or malformed"),
        ({"texts": "{}"}, "its factors contradict"),
    ],
)
def test_a_file_with_odd_metadata_is_refused(tmp_path, changes, message):
    save_file(tensors(), tmp_path / "s", metadata(**changes))
    with pytest.raises(FormatError, match=message) as caught:
        Statistics.load(tmp_path / "s")
    assert "--output" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "steps is missing"),
        ({"keys": None}, "keys is missing"),
        ({"keys": np.array([[3, 5]], np.uint64)}, "keys is missing or malformed"),
        ({"keys": np.array([3, 5])}, "keys is malformed: I64"),
        ({"keys": np.array([5, 3], np.uint64)}, "do not ascend"),
        ({"keys": np.array([3, 3], np.uint64)}, "do not ascend"),
        ({"layers.0.counts": None}, "counts of a layer are missing"),
        ({"layers.0.counts": np.ones(NEURONS, np.int64)}, "counts of a layer are missing"),
        ({"layers.0.sample": None}, "layers.0.sample is missing"),
        ({"layers.0.sample": np.zeros((2, 3), np.uint8)}, "sample is malformed"),
        ({"layers.0.sample": np.full((2, 2), 255, np.uint8)}, "beyond the 11"),
        ({"layers.2.counts": np.ones((2, 1), np.int64)}, "counts of a layer are missing"),
        ({"layers.999999999.counts": np.ones((2, 1), np.int64)}, "counts of a layer are missing"),
        ({"layers.01.counts": np.ones((2, NEURONS), np.int64)}, "is missing, or unknown"),
        ({"layers.0.counts": np.ones((2, NEURONS), np.int32)}, "malformed"),
        ({"layers.0.counts": np.ones((3, NEURONS), np.int64)}, "malformed"),
        ({"layers.0.counts": np.full((2, NEURONS), 3)}, "more often than it was seen"),
        ({"layers.0.counts": np.full((2, NEURONS), -1)}, "more often than it was seen"),
        ({"factors": np.array([[3, 8, 4]])}, "factors contradict"),
        ({"factors": np.array([[-3, 8, -4]])}, "factors contradict"),
        ({"factors": np.array([[3, 999, 2]])}, "factors contradict"),
        ({"repeats": np.array([[3, 2]])}, "repeats contradict"),
        ({"repeats": np.array([[-3, 2]])}, "repeats contradict"),
        (
            {"keys": np.arange(5, dtype=np.uint64), "layers.0.sample": np.zeros((5, 2), np.uint8)},
            "more tokens than were counted",
        ),
        ({"keys": np.arange(SAMPLE + 1, dtype=np.uint64)}, "keys is missing or malformed"),
    ],
)
def test_a_file_with_odd_tensors_is_refused(tmp_path, changes, message):
    save_file(tensors(**changes), tmp_path / "s", metadata())
    with pytest.raises(FormatError, match=message):
        Statistics.load(tmp_path / "s")


def sketch_of(text, first, tokens, size):
    """Neuron 0 of layer 0 carries the parity of the token's place."""
    sets = np.zeros((1, tokens, 1), np.uint8)
    sets[0, :, 0] = (np.arange(first, first + tokens) % 2) << 7
    return ActivitySketch.of_tokens(text, first, sets, 3, size)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1 << 60), st.integers(1, 40), st.integers(0, 40), st.integers(1, 30))
def test_the_sketches_of_two_halves_are_that_of_the_whole(seed, first, second, size):
    text = f"{seed:016x}" + "0" * 48
    halves = [sketch_of(text, 0, first, size), sketch_of(text, first, second, size)]
    whole = sketch_of(text, 0, first + second, size)
    for a, b in (halves, halves[::-1]):
        merged = a.merged(b, size)
        assert np.array_equal(merged.keys, whole.keys)
        assert np.array_equal(merged.sets, whole.sets)
    assert whole.tokens == min(size, first + second)
    whole.check()


def test_a_sketch_is_a_fair_sample_of_places_and_texts():
    """Of 40 texts of 500 tokens; the bounds are six standard deviations of a fair draw."""
    sketch = ActivitySketch.empty(1, 3)
    texts = [f"{i:016x}" + "0" * 48 for i in range(40)]
    for text in texts:
        sketch = sketch.merged(sketch_of(text, 0, 500, SAMPLE))
    odd = sketch.active(0)[:, 0].mean()
    assert abs(odd - 0.5) < 6 * 0.5 / np.sqrt(SAMPLE)
    per_text = [np.isin(token_keys(text, 0, 500), sketch.keys).sum() for text in texts]
    assert sum(per_text) == SAMPLE
    assert max(per_text) < SAMPLE / 40 + 6 * np.sqrt(SAMPLE / 40)
