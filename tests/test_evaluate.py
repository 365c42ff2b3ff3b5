"""Judging predictors: figures against a second way to compute them; the oracle and the look-ahead."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activity import active_neurons
from pi2.api import Predictor, Probe
from pi2.builtin.lookahead_predictor import LookaheadPredictor
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.builtin.oracle_predictor import OraclePredictor
from pi2.config import Settings
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.evaluate import LayerScore, Likelihood, PredictorMeter, evaluate
from pi2.plugins import Plugins
from pi2.testing.models import ffn_inputs, toy_architecture, write_toy_model
from pi2.testing.predictor import spec_of

BUILTINS = Plugins.installed(Settings(plugins=frozenset()))
PROSE = "She sells sea shells on the sea shore, and the shells she sells are sea shells. " * 8


class HalfPredictor(Predictor):
    """Names every second neuron."""

    name = "half"
    lossless = False

    @classmethod
    def probe(cls):
        return Probe(1, "for this test")

    def attach(self, model, backend):
        self._ids = np.arange(0, model.architecture.n_neurons, 2, dtype=np.int32)

    def predict(self, ffn, x):
        return self._ids


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    arch = toy_architecture(n_layers=3, max_context=64)
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", arch, quant="f32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(PROSE)
    return path


def judged(model, text, predictor=None, **options):
    with Engine.open(model, predictor=predictor, plugins=BUILTINS) as engine:
        return evaluate(engine, [text], **{"tokens": 64, "sequence": 32, **options})


def test_the_exact_predictor_is_the_dense_model(model, text):
    found = judged(model, text)
    assert (found.scored, found.sequences, found.agreement) == (64, 2, 1.0)
    assert found.loss == found.loss_error == 0
    for score in found.layers:
        assert (score.total, score.calls) == (64 * 160, 64)
        assert (score.recall, score.predicted_density) == (1, 1)
        assert score.precision == score.density
        assert 0.05 < score.density < 0.4


def test_perplexity_is_that_of_the_logits(model, text):
    found = judged(model, text, against_dense=False)
    assert (found.dense, found.agreement, found.loss, found.loss_error) == (None, None, None, None)
    nll = []
    with Engine.open(model, plugins=BUILTINS) as engine:
        for start in (0, 32):
            ids = [256, *engine.tokenizer.encode(PROSE[start : start + 32], bos=False)]
            logits = engine.logits(ids)[:-1].astype(np.float64)
            p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            nll += (-np.log(p[np.arange(32), ids[1:]])).tolist()
    assert found.sparse.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


def test_the_oracle_names_the_active_and_nothing_else(model, text):
    found = judged(model, text, "oracle")
    for score in found.layers:
        assert score.recall == score.precision == 1
        assert score.predicted_density == score.density
    assert found.agreement == 1


def test_a_predictor_that_misses_is_seen_to_miss(model, text):
    with Engine.open(model, plugins=BUILTINS) as engine:
        half = HalfPredictor()
        half.attach(engine.model, NumpyBackend())
        engine.decoder.predictor = half
        found = evaluate(engine, [text], tokens=64, sequence=32)
        assert engine.decoder.predictor is half
    for score in found.layers:
        assert score.predicted_density == 0.5
        assert 0.3 < score.recall < 0.7
        assert score.seconds > 0
    assert found.loss != 0
    differences = np.array(found.sparse.losses) - found.dense.losses
    assert np.expm1(differences.mean()) == pytest.approx(found.loss)
    assert found.loss_error == pytest.approx(differences.std() / 8)  # 64 tokens
    assert found.overall().total == 3 * 64 * 160


def test_a_look_ahead_with_more_margin_names_more_and_misses_less(model, text):
    narrow, wide = (judged(model, text, f"lookahead:margin={m}") for m in (0, 2))
    assert narrow.layers[0].predicted_density == wide.layers[0].predicted_density == 1
    for a, b in zip(narrow.layers[1:], wide.layers[1:], strict=True):
        assert a.predicted_density < b.predicted_density <= 1
        assert a.recall <= b.recall
        assert a.recall > 1.5 * a.predicted_density  # far better than chance


@pytest.mark.parametrize("changes", [{}, {"norm": "layer", "norm_bias": True}, {"norm_place": "post"}])
def test_a_look_ahead_over_a_residual_that_does_not_change_is_exact(tmp_path, changes):
    """The input of FFN 1 is then that of FFN 0 under the other norm weights, which it exchanges."""
    with Engine.open(
        write_toy_model(tmp_path / "m", toy_architecture(**changes), quant="f32"), plugins=BUILTINS
    ) as engine:
        view = engine.model
        block = "attn" if view.architecture.norm_place == "post" else "ffn"
        norms = [engine.decoder._norms[f"layers.{i}.{block}.norm"] for i in (0, 1)]
        h = ffn_inputs(view.architecture, 1, np.random.default_rng(2))
        predictor = LookaheadPredictor(margin=0)
        predictor.attach(view, NumpyBackend())
        assert predictor.predict(0, norms[0](h)) is None
        named = predictor.predict(1, norms[1](h))
        expected = np.flatnonzero(active_neurons(view, 1, norms[1](h))[0])
        assert len(np.setxor1d(named, expected)) <= 1  # a gate within rounding of zero
        predictor.close()
        predictor.close()


def test_a_look_ahead_without_a_call_before_names_all(model):
    with Engine.open(model, plugins=BUILTINS) as engine:
        predictor = LookaheadPredictor()
        predictor.attach(engine.model, NumpyBackend())
        x = ffn_inputs(engine.model.architecture, 1, np.random.default_rng(0))
        assert predictor.predict(2, x) is None
        assert "margin 1 " in predictor.describe()
        predictor.close()


@pytest.mark.parametrize("margin", ["-1", "nan"])
def test_a_margin_that_cannot_be_is_refused(margin):
    with pytest.raises(OptionError, match="counts standard deviations"):
        LookaheadPredictor.open({"margin": margin})


@pytest.mark.parametrize("predictor", ["oracle", "lookahead"])
def test_where_every_neuron_is_active_all_are_named(tmp_path, text, predictor):
    arch = toy_architecture(activation="silu", max_context=64)
    found = judged(write_toy_model(tmp_path / "m", arch), text, predictor)
    assert found.overall().recall == found.overall().predicted_density == found.overall().density == 1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 32), st.floats(0, 1))
def test_supersets_give_the_dense_bits_and_subsets_lose_only_the_missing_terms(model, seed, share):
    rng = np.random.default_rng(seed)
    with Engine.open(model, plugins=BUILTINS) as engine:
        view, backend = engine.model, NumpyBackend()
        x = ffn_inputs(view.architecture, 1, rng)
        handle = backend.place_ffn(view.bundles(1), spec_of(view))
        oracle = OraclePredictor()
        oracle.attach(view, backend)
        active = oracle.predict(1, x)

        def ffn(rows):
            out = np.empty_like(x)
            backend.ffn(handle, x, out, rows)
            return out

        dense = ffn(None)
        extra = np.flatnonzero(rng.random(view.architecture.n_neurons) < share)
        assert np.array_equal(ffn(np.union1d(active, extra).astype(np.int32)), dense)
        kept = rng.random(len(active)) < share
        missing = ffn(active[~kept])
        np.testing.assert_allclose(ffn(active[kept]) + missing, dense, atol=1e-5)


def test_likelihood_takes_logits_of_any_size():
    found = Likelihood()
    assert np.isnan(found.perplexity)
    found.add(np.array([[1e30, 0], [0, -1e30]], np.float32), np.array([0, 0]))
    assert (found.perplexity, found.likeliest) == (1, [0, 0])
    found.add(np.array([[1e5, 0]], np.float32), np.array([1]))
    assert found.perplexity == np.inf


def test_shares_of_nothing_are_one():
    assert LayerScore().recall == LayerScore().precision == 1


def test_without_a_wish_sequences_are_what_the_context_has_room_for(model, text):
    assert judged(model, text, sequence=None).sequence == 63


def test_the_meter_is_not_to_be_chosen():
    assert not PredictorMeter.probe()


@pytest.mark.parametrize("sequence", [1, 64])
def test_sequences_that_do_not_suit_the_context_are_refused(model, text, sequence):
    with pytest.raises(OptionError, match=f"sequences of {sequence} tokens") as caught:
        judged(model, text, sequence=sequence)
    assert caught.value.hint == "2 to 63 are possible"
