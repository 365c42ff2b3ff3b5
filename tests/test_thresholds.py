"""Thresholds: what is chosen, what the predictor names, and what their file may not claim."""

from __future__ import annotations

import json

import numpy as np
import pytest
import threshold_files
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activations import activate, hidden
from pi2.activity import gate_values
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.builtin.threshold_predictor import ThresholdPredictor
from pi2.config import Settings
from pi2.container import replace_file
from pi2.engine import Engine
from pi2.errors import FormatError, OptionError
from pi2.offload_options import OffloadOptions
from pi2.plugins import Plugins
from pi2.statistics_file import FORMAT, STATISTICS, Statistics
from pi2.testing.models import ffn_inputs, toy_architecture, write_toy_model
from pi2.testing.predictor import MODELS, spec_of
from pi2.thresholds import Curve
from safetensors.numpy import save_file

BUILTINS = Plugins.installed(Settings(plugins=frozenset()))
NAN = float("nan")


def curve(losses):
    densities = np.linspace(0.9, 0.3, len(losses))
    cuts = np.arange(1, len(losses) + 1, dtype=np.float32)[:, None] * np.array([1, 10], np.float32)
    return Curve(densities, cuts, np.array(losses, np.float64))


losses = st.lists(st.floats(-0.05, 0.6), min_size=1, max_size=7)


@settings(deadline=None, max_examples=100)
@given(losses, st.floats(0, 0.7))
def test_the_smallest_density_that_loses_at_most_so_much_is_chosen(found, allowed):
    c = curve(found)
    choice = c.at_loss(allowed)
    assert choice.loss <= allowed + 1e-12
    assert c.densities[-1] - 1e-12 <= choice.density <= 1
    judged = np.maximum.accumulate(found)
    assert all(
        loss > allowed for d, loss in zip(c.densities, judged, strict=True) if d < choice.density - 1e-9
    )
    again = c.at_density(choice.density)
    assert again.loss == pytest.approx(choice.loss)
    assert np.array_equal(again.cuts, choice.cuts)


@settings(deadline=None, max_examples=50)
@given(losses, st.floats(0.3, 1), st.floats(0.3, 1))
def test_less_density_never_costs_less_and_never_cuts_lower(found, a, b):
    c = curve(found)
    low, high = (c.at_density(max(d, float(c.densities[-1]))) for d in sorted((a, b)))
    assert low.loss >= high.loss
    assert np.all(low.cuts >= high.cuts)
    assert c.at_density(1.0).loss == 0
    assert not c.at_density(1.0).cuts.any()


def test_a_density_that_was_not_judged_is_refused():
    c = curve([0.01, 0.02, NAN, NAN])
    assert c.judged == 2
    assert c.at_loss(1).density == pytest.approx(c.densities[1])
    for density in (0.3, 1.1):
        with pytest.raises(OptionError, match=r"is not within the 0\.\d+ to 1 that were calibrated"):
            c.at_density(density)


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request, tmp_path_factory):
    arch = toy_architecture(**MODELS[request.param])
    path = write_toy_model(tmp_path_factory.mktemp("thresholds") / "model", arch)
    threshold_files.install(path, arch)
    with Engine.open(path, plugins=BUILTINS) as engine:
        yield engine.model


@pytest.mark.parametrize("rule", ["product", "gate"])
def test_what_reaches_the_cut_is_named_and_nothing_else(model, rule):
    predictor = ThresholdPredictor.open({"density": "0.5", "max_loss": "0.1", "rule": rule})
    predictor.attach(model, NumpyBackend())
    rng = np.random.default_rng(1)
    weights = threshold_files.made_up("", 2, model.architecture.n_neurons).weights
    for ffn in range(2):
        x = ffn_inputs(model.architecture, 1, rng)
        first = gate_values(model, ffn, x)[0]
        spec = spec_of(model)
        if rule == "gate":
            h = activate(spec, first) * weights[ffn]
        elif spec.geometry.gate is None:
            h = activate(spec, first)
        else:
            h = hidden(spec, first, gate_values(model, ffn, x, "up")[0])
        named = predictor.predict(ffn, x)
        doubtful = np.abs(np.abs(h) - 0.2) < 1e-5
        expected = np.flatnonzero((np.abs(h) >= 0.2) | doubtful)
        assert np.isin(np.setxor1d(named, expected), np.flatnonzero(doubtful)).all()
        assert 0 < len(named) < len(h)
    predictor.close()
    predictor.close()


def test_several_tokens_get_the_union_of_their_neurons(model):
    predictor = ThresholdPredictor(0.8)
    predictor.attach(model, NumpyBackend())
    x = ffn_inputs(model.architecture, 3, np.random.default_rng(2))
    each = [predictor.predict(0, row[None]) for row in x]
    assert np.array_equal(predictor.predict(0, x), np.unique(np.concatenate(each)))
    predictor.close()


def test_an_empty_budget_of_loss_names_all(model):
    predictor = ThresholdPredictor(max_loss=0)
    predictor.attach(model, NumpyBackend())
    assert predictor.predict(0, ffn_inputs(model.architecture, 1, np.random.default_rng(0))) is None
    assert "density 100.0%, perplexity +0.00%" in predictor.describe()


def attached(path, **options):
    with Engine.open(path, plugins=BUILTINS) as engine:
        predictor = ThresholdPredictor(**options)
        predictor.attach(engine.model, NumpyBackend())
        predictor.close()
        return predictor.describe()


@pytest.fixture
def silu(tmp_path):
    return write_toy_model(tmp_path / "silu", toy_architecture(activation="silu"))


def test_a_loss_beyond_what_is_allowed_is_refused_and_stated(silu):
    threshold_files.install(silu, toy_architecture())
    with pytest.raises(OptionError, match=r"density 0.5 lost 3.00% .* than the 1.00% allowed") as caught:
        attached(silu, density=0.5)
    assert "threshold:density=0.5,max_loss=0.03,rule=product" in caught.value.hint
    assert "by product, density 50.0%, perplexity +3.00%" in attached(silu, density=0.5, max_loss=0.03)
    assert "by gate, density 73.1%, perplexity +1.00% as measured on 512 tokens" in attached(
        silu, rule="gate"
    )


def test_without_thresholds_the_command_that_makes_them_is_named(silu):
    for install in (lambda: None, lambda: replace_file(silu, STATISTICS, Statistics().save)):
        install()
        with pytest.raises(FormatError, match="the model has no thresholds") as caught:
            attached(silu)
        assert "pi2 collect MODEL TEXT --thresholds" in caught.value.hint


def test_thresholds_that_do_not_suit_are_refused(silu):
    other = threshold_files.made_up("another", 2, 160)
    replace_file(silu, STATISTICS, Statistics(thresholds=other).save)
    with pytest.raises(FormatError, match="of another model"):
        attached(silu)
    threshold_files.install(silu, toy_architecture(n_layers=3))
    with pytest.raises(FormatError, match="do not fit the model"):
        attached(silu)
    threshold_files.install(silu, toy_architecture(), losses=(NAN, NAN))
    with pytest.raises(FormatError, match="the rule gate was not calibrated"):
        attached(silu, rule="gate")


@pytest.mark.parametrize("rule", ["product", "gate"])
def test_a_model_on_flash_has_the_logits_of_the_resident_one(silu, rule):
    threshold_files.install(silu, toy_architecture())
    choice = f"threshold:density=0.5,max_loss=1,rule={rule}"
    found = []
    for offload in (None, OffloadOptions(slots=170)):
        with Engine.open(
            silu, backend="numpy", predictor=choice, plugins=BUILTINS, offload=offload
        ) as engine:
            predictor, session = engine.decoder.predictor, engine.session()
            session.forward([256, 1, 2])
            found.append(np.stack([session.forward([token]) for token in (7, 8, 9)]))
            rows = 160 * (1 if rule == "gate" else 2) * (64 + 4)  # q8_0: 64 quants, two scales
            assert predictor.footprint(0) == (0, rows)
            assert predictor.offloaded_bytes(engine.model) == 2 * rows
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": "0"}, "density is 0.0, but is a share"),
        ({"density": "1.5"}, "density is 1.5"),
        ({"max_loss": "nan"}, "max_loss is nan"),
        ({"rule": "both"}, "there is no rule 'both'"),
    ],
)
def test_options_that_cannot_be_are_refused(silu, options, message):
    threshold_files.install(silu, toy_architecture())
    with pytest.raises(OptionError, match=message) as caught, Engine.open(silu, plugins=BUILTINS) as engine:
        ThresholdPredictor.open(options).attach(engine.model, NumpyBackend())
    assert caught.value.hint


def test_thresholds_survive_the_file_beside_counts(tmp_path):
    found = threshold_files.made_up("m", 11, 3, losses=(0.01, NAN))
    Statistics(thresholds=found).save(tmp_path / "s")
    again = Statistics.load(tmp_path / "s")
    assert again.counts is None
    assert again.thresholds is not None
    assert (again.thresholds.model, again.thresholds.texts, again.thresholds.tokens) == (
        "m",
        found.texts,
        512,
    )
    assert np.array_equal(again.thresholds.weights, found.weights)
    for rule, expected in found.curves.items():
        c = again.thresholds.curves[rule]
        assert np.array_equal(c.cuts, expected.cuts)
        assert np.array_equal(c.losses, expected.losses, equal_nan=True)
        assert np.array_equal(c.densities, expected.densities)


GOOD = {"texts": ["ab"], "tokens": 5, "curves": {"gate": {"densities": [0.8, 0.5], "losses": [0.1, None]}}}
W, CUTS = "thresholds.weights", "thresholds.gate.cuts"


def gate(densities, losses):
    return {"curves": {"gate": {"densities": densities, "losses": losses}}}


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({}, {}, None),
        (None, {}, "not JSON"),
        ({"tokens": 0}, {}, "malformed"),
        ({"tokens": True}, {}, "malformed"),
        ({"texts": "ab"}, {}, "malformed"),
        ({"curves": 3}, {}, "incomplete"),
        ({"curves": {"gate": 3}}, {}, "incomplete"),
        ({"curves": {"else": {"densities": [], "losses": []}}}, {}, "malformed"),
        ({"curves": {}}, {}, "too many or too few"),
        ({}, {W: None}, "too many or too few"),
        ({}, {CUTS: None}, "too many or too few"),
        ({}, {"thresholds.product.cuts": np.zeros((2, 3), np.float32)}, "too many or too few"),
        ({}, {W: np.zeros((3, 4))}, "F64"),
        ({}, {W: np.zeros((3, 4), np.int64)}, "malformed"),
        ({}, {W: np.zeros(3, np.float32)}, "malformed"),
        ({}, {W: np.full((3, 4), np.nan, np.float32)}, "beyond reason"),
        ({}, {W: np.full((3, 4), -1, np.float32)}, "below zero"),
        ({}, {CUTS: np.full((2, 3), np.inf, np.float32)}, "beyond reason"),
        ({}, {CUTS: np.array([[1, 1, 1], [2, 0, 2]], np.float32)}, "do not rise"),
        ({}, {CUTS: np.zeros((2, 4), np.float32)}, "do not rise"),
        ({}, {CUTS: np.zeros((1, 3), np.float32)}, "malformed"),
        (gate([0.5, 0.8], [0.1, 0.2]), {}, "do not descend"),
        (gate([0.5, 0.5], [0.1, 0.2]), {}, "do not descend"),
        (gate([1.0, 0.5], [0.1, 0.2]), {}, "do not descend"),
        (gate(["0.8", 0.5], [0.1, 0.2]), {}, "do not descend"),
        (gate([0.8, 0.5], [0.1, "0.2"]), {}, "losses of the thresholds"),
        (gate([0.8, 0.5], [0.1]), {}, "malformed"),
        (gate([0.8, 0.5], [0.1, 1e999]), {}, "not JSON"),
    ],
)
def test_a_file_with_odd_thresholds_is_refused(tmp_path, metadata, tensors, message):
    arrays = {W: np.ones((3, 4), np.float32), CUTS: np.ones((2, 3), np.float32), **tensors}
    text = "{" if metadata is None else json.dumps({**GOOD, **metadata})
    kept = {name: value for name, value in arrays.items() if value is not None}
    save_file(kept, tmp_path / "s", {"format": FORMAT, "model": "m", "thresholds": text})
    if message is None:
        assert Statistics.load(tmp_path / "s").thresholds.curves["gate"].judged == 1
        return
    with pytest.raises(FormatError, match=message):
        Statistics.load(tmp_path / "s")
