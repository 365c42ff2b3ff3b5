"""Collecting: what is counted is what is active, a stopped run goes on, texts that are none are refused."""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np
import pytest
from pi2.activity import active_neurons
from pi2.collect import Collector
from pi2.config import Settings
from pi2.container import read_manifest, replace_file
from pi2.engine import Engine
from pi2.errors import FormatError, OptionError, StorageError
from pi2.plugins import Plugins
from pi2.statistics_file import Statistics
from pi2.testing import reference
from pi2.testing.models import ffn_inputs, toy_architecture, write_toy_model
from pi2.testing.predictor import MODELS, spec_of
from pi2.text_files import read_texts

PROSE = "The quick brown fox jumps over the lazy dog while it rains. " * 40
BUILTINS = {"plugins": Plugins.installed(Settings(plugins=frozenset()))}


def assert_same(a, b):
    assert (a.model, a.sequence, a.batches, a.texts) == (b.model, b.sequence, b.batches, b.texts)
    assert np.array_equal(a.counts, b.counts)
    for name in ("steps", "repeats", "factors"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    assert np.array_equal(a.sketch.keys, b.sketch.keys)
    assert np.array_equal(a.sketch.sets, b.sketch.sets)


def model_of(tmp_path, **changes):
    return write_toy_model(tmp_path / "model", toy_architecture(max_context=24, **changes))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_active_is_what_the_reference_finds_active(tmp_path, kind):
    arch = toy_architecture(**MODELS[kind])
    with Engine.open(write_toy_model(tmp_path / "model", arch), **BUILTINS) as engine:
        model = engine.model
        x = ffn_inputs(arch, 9, np.random.default_rng(1))
        neurons = model.geometry.unpack(model.bundles(1))
        found = active_neurons(model, 1, x)
        assert np.all(found[reference.ffn(neurons, spec_of(model), x, 1e-5).active])
        if arch.sparse:
            assert 0 < found.mean() < 0.6


@pytest.fixture
def texts(tmp_path):
    """Two texts, the second longer; a byte is a token."""
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text(PROSE[:150])
    paths[1].write_text(PROSE[::-1][:310])
    return paths


def collected(model, paths, tokens=None, batches=(1, 2, 4)):
    with Engine.open(model, **BUILTINS) as engine:
        collector = Collector(engine, batches)
        collector.run(paths, tokens)
        return collector.counts


def test_the_counts_of_batch_one_are_those_of_the_decoder(tmp_path, texts):
    model = model_of(tmp_path)
    counts = collected(model, texts[:1])
    assert (counts.sequence, counts.tokens, counts.steps[0]) == (23, 138, 138)
    with Engine.open(model, **BUILTINS) as engine:
        (text,) = read_texts(texts[:1], engine.tokenizer, 23)
        bos = active = 0
        for ids in text.sequences:
            engine.decoder.ffn_count.active = 0
            engine.logits([256])
            bos, _ = engine.decoder.ffn_count.active, engine.logits([256, *ids])
            active += engine.decoder.ffn_count.active - 2 * bos
    assert abs(int(counts.counts[:, 0].sum()) - active) <= 2  # gates within rounding of zero


def test_several_texts_count_as_the_sum_of_each(tmp_path, texts):
    model = model_of(tmp_path)
    assert_same(collected(model, texts), collected(model, texts[:1]).merged(collected(model, texts[1:])))


def test_a_collection_that_was_stopped_goes_on_to_the_same_counts(tmp_path, texts):
    model = model_of(tmp_path)
    with Engine.open(model, **BUILTINS) as engine:
        stopped = Collector(engine, (1, 2, 4))

        def stop(what, done, total):
            if done >= 23 * 12:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped.run(texts, progress=stop)
        assert engine.decoder.observer is None
        assert 0 < stopped.counts.tokens < 23 * 12
        Statistics(stopped.counts).save(tmp_path / "s")
        resumed = Collector(engine, (1, 2, 4))
        resumed.resume(Statistics.load(tmp_path / "s").counts)
        heard = []
        resumed.run(texts, progress=lambda what, done, total: heard.append((done, total)))
        assert heard[0][0] == stopped.counts.tokens + 23
        assert heard[-1] == (resumed.counts.tokens, resumed.counts.tokens)
        again = resumed.counts
        resumed.run(texts)
    assert_same(again, collected(model, texts))
    assert_same(resumed.counts, again)


def test_tokens_bound_what_is_counted(tmp_path, texts):
    model = model_of(tmp_path)
    assert collected(model, texts, tokens=100).tokens == 92
    assert collected(model, texts, tokens=1).tokens == 23
    assert list(collected(model, texts, tokens=10_000).texts.values()) == [6, 13]


def test_counts_of_another_model_are_not_gone_on_with(tmp_path, texts):
    counts = collected(model_of(tmp_path), texts, 23)
    other = dataclasses.replace(counts, model="another")
    with (
        Engine.open(tmp_path / "model", **BUILTINS) as engine,
        pytest.raises(FormatError, match="the statistics are of another model"),
    ):
        Collector(engine, (1, 2, 4)).resume(other)
    Statistics(other).save(tmp_path / "s")
    message = re.escape(f"{tmp_path / 's'}: the statistics are of another model")
    with pytest.raises(FormatError, match=message):
        Statistics.of_file(tmp_path / "s", counts.model)
    assert Statistics.of_file(tmp_path / "none", counts.model) == Statistics()


def test_a_model_without_exact_zeros_has_nothing_to_count(tmp_path):
    model = model_of(tmp_path, activation="silu")
    with Engine.open(model, **BUILTINS) as engine, pytest.raises(OptionError, match="silu has no exact"):
        Collector(engine)


def test_a_context_without_room_is_refused(tmp_path):
    model = model_of(tmp_path)
    with (
        Engine.open(model, context=1, **BUILTINS) as engine,
        pytest.raises(OptionError, match="context of 1 has no room"),
    ):
        Collector(engine)


def test_texts_that_are_no_texts_are_refused(tmp_path, texts):
    model = model_of(tmp_path)
    short, latin = tmp_path / "short", tmp_path / "latin"
    short.write_text("few")
    latin.write_bytes(b"caf\xe9" * 30)
    cases = {short: "has 3 tokens, a sequence takes 23", latin: "not UTF-8 at byte 3", tmp_path: "directory"}
    for path, message in cases.items():
        with pytest.raises((OptionError, StorageError), match=message) as caught:
            collected(model, [path])
        assert caught.value.hint
    with pytest.raises(OptionError, match="are the same text"):
        collected(model, [texts[0], texts[0]])


def test_an_observer_sees_every_input_and_changes_nothing(tmp_path):
    with Engine.open(model_of(tmp_path), **BUILTINS) as engine:
        plain = engine.logits([256, 1, 2])
        seen = []
        engine.decoder.observer = lambda layer, x: seen.append((layer, x.shape))
        assert np.array_equal(engine.logits([256, 1, 2]), plain)
    assert seen == [(0, (3, 64)), (1, (3, 64))]


def test_a_file_in_a_model_is_replaced_and_listed(tmp_path):
    model = model_of(tmp_path)
    for content in (b"one", b"another"):
        replace_file(model, "statistics.safetensors", lambda path, c=content: path.write_bytes(c))
        assert read_manifest(model).files["statistics.safetensors"].nbytes == len(content)
        with Engine.open(model, verify=True, **BUILTINS):
            pass

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        replace_file(model, "statistics.safetensors", fail)
    assert (model / "statistics.safetensors").read_bytes() == b"another"
    assert not list(model.glob("*.new"))
    with Engine.open(model, verify=True, **BUILTINS):
        pass


def test_the_metadata_says_what_was_counted(tmp_path, texts):
    from safetensors import safe_open

    Statistics(collected(model_of(tmp_path), texts[:1])).save(tmp_path / "s")
    with safe_open(tmp_path / "s", "np") as f:
        found = f.metadata()
        layers = {f"layers.{i}.{what}" for i in (0, 1) for what in ("counts", "sample")}
        assert set(f.keys()) == {"steps", "repeats", "factors", "keys"} | layers
    assert (found["tokens"], json.loads(found["batches"])) == ("138", [1, 2, 4])
    assert list(json.loads(found["texts"]).values()) == [6]
