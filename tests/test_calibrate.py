"""Calibration: densities are met, losses are measured, a stopped run goes on."""

from __future__ import annotations

import numpy as np
import pytest
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.calibrate import DENSITIES, Calibration
from pi2.config import Settings
from pi2.container import replace_file
from pi2.container.layout import QuantPlan
from pi2.convert import convert
from pi2.divergence import Divergence
from pi2.engine import Engine
from pi2.errors import OptionError
from pi2.evaluate import Likelihood, evaluate
from pi2.kv_cache import KvCache
from pi2.plugins import Plugins
from pi2.probed_backend import ProbedBackend
from pi2.statistics_file import STATISTICS, Statistics
from pi2.tensor import Tensor
from pi2.testing.models import RandomSource, ffn_inputs, toy_architecture, write_toy_model
from pi2.testing.predictor import MODELS, spec_of

BUILTINS = Plugins.installed(Settings(plugins=frozenset()))


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_looking_at_neurons_changes_nothing(tmp_path, kind):
    arch = toy_architecture(**MODELS[kind])
    with Engine.open(write_toy_model(tmp_path / "m", arch), plugins=BUILTINS) as engine:
        seen = []
        plain = NumpyBackend()
        probed = ProbedBackend(lambda ffn, gate, other, h: (seen.append(ffn), h)[1])
        spec, x = spec_of(engine.model), ffn_inputs(arch, 5, np.random.default_rng(0))
        handles = [[b.place_ffn(engine.model.bundles(i), spec) for i in range(2)] for b in (plain, probed)]
        for i in (1, 0):
            a, b = np.empty_like(x), np.empty_like(x)
            assert abs(plain.ffn(handles[0][i], x, a) - probed.ffn(handles[1][i], x, b)) <= 2
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert seen == [1, 0]
    assert not ProbedBackend.probe()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    arch = toy_architecture(activation="silu", max_context=48)
    return write_toy_model(tmp_path_factory.mktemp("models") / "silu", arch)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A byte is a token; sequences are 47 long."""
    home = tmp_path_factory.mktemp("texts")
    for name, prose in (
        ("a", "Rain falls from clouds when drops grow heavy. "),
        ("b", "THE SUN: 93 M miles! "),
    ):
        (home / name).write_text(prose * 20)
    return [home / "a", home / "b"]


@pytest.fixture(scope="module")
def calibrated(model, texts):
    with Engine.open(model, plugins=BUILTINS) as engine:
        calibration = Calibration(engine, texts, 12 * 47)
        calibration.run()
        return calibration.thresholds


def test_every_density_is_judged_until_it_is_hopeless(calibrated):
    assert set(calibrated.curves) == {"product", "gate"}
    assert (calibrated.tokens, len(calibrated.texts)) == (8 * 47, 2)
    for curve in calibrated.curves.values():
        assert curve.densities.tolist() == list(DENSITIES)
        assert np.all(np.diff(curve.cuts, axis=0) >= 0)
        assert np.isfinite(curve.losses[: curve.judged]).all()
        assert curve.judged == 7 or curve.losses[curve.judged - 1] > 0.5
        assert abs(curve.losses[0]) < 0.1


@pytest.mark.parametrize("rule", ["product", "gate"])
def test_the_predictor_meets_the_density_and_the_loss_that_were_measured(model, texts, calibrated, rule):
    """Token by token, as in decoding, over the same sequences."""
    replace_file(model, STATISTICS, Statistics(thresholds=calibrated).save)
    choice = f"threshold:density=0.6,max_loss=9,rule={rule}"
    with Engine.open(model, predictor=choice, plugins=BUILTINS) as engine:
        assert not engine.setup()["lossless"]
        found = evaluate(engine, texts, tokens=940, sequence=47)
        perplexities = []
        for predictor in (engine.decoder.predictor, ExactPredictor()):
            engine.decoder.predictor, likelihood = predictor, Likelihood()
            for ids in Calibration(engine, texts, 12 * 47)._for_losses:
                cache = KvCache(engine.decoder.arch, 48)
                whole = np.concatenate(([256], ids))
                for at in range(47):
                    logits = engine.decoder.forward(whole[at : at + 1], cache)
                    likelihood.add(logits[None], whole[at + 1 : at + 2])
            perplexities.append(likelihood.perplexity)
    assert found.overall().predicted_density == pytest.approx(0.6, abs=0.03)
    measured = calibrated.curve(rule).losses[DENSITIES.index(0.6)]
    assert perplexities[0] / perplexities[1] - 1 == pytest.approx(measured, abs=1e-3)


def test_a_stopped_calibration_goes_on_to_the_same_thresholds(model, texts, calibrated, tmp_path):
    with Engine.open(model, plugins=BUILTINS) as engine:
        stopped = Calibration(engine, texts, 12 * 47)
        saved = []

        def checkpoint():
            Statistics(thresholds=stopped.thresholds).save(tmp_path / "s")
            saved.append(1)
            if len(saved) == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped.run(checkpoint=checkpoint)
        resumed = Calibration(engine, texts, 12 * 47)
        resumed.resume(Statistics.load(tmp_path / "s").thresholds)
        assert resumed.thresholds.curves["product"].judged == 3
        readings = []
        resumed.run(progress=lambda what, done, total: readings.append(what))
        assert readings[0] == "dense"
        again = len(readings)
        resumed.run(progress=lambda what, done, total: readings.append(what))
        assert len(readings) == again
    for rule, curve in calibrated.curves.items():
        found = resumed.thresholds.curves[rule]
        assert np.array_equal(found.cuts, curve.cuts)
        assert np.array_equal(found.losses, curve.losses, equal_nan=True)


def test_another_text_begins_anew(model, texts, calibrated):
    with Engine.open(model, plugins=BUILTINS) as engine:
        other = Calibration(engine, texts[:1], 12 * 47)
        other.resume(calibrated)
        assert not other.thresholds.curves


def test_progress_ends_at_the_whole_if_nothing_is_hopeless(model, texts):
    with Engine.open(model, plugins=BUILTINS) as engine:
        heard = []
        Calibration(engine, texts, 3 * 47).run(lambda what, done, total: heard.append((done, total)))
    assert all(done <= total for done, total in heard)
    assert heard[0][0] == 47


def test_too_little_text_or_context_is_refused(model, tmp_path):
    (tmp_path / "short").write_text("x" * 50)
    with (
        Engine.open(model, plugins=BUILTINS) as engine,
        pytest.raises(OptionError, match="too few") as caught,
    ):
        Calibration(engine, [tmp_path / "short"])
    assert caught.value.hint == "give at least 94"
    with (
        Engine.open(model, context=2, plugins=BUILTINS) as engine,
        pytest.raises(OptionError, match="context of 2 is too small"),
    ):
        Calibration(engine, [tmp_path / "short"])


def test_divergence_is_that_of_the_distributions_at_every_second_place():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0, 2, (2, 9, 30))
    found = Divergence()
    found.add(first, np.zeros(9))
    found.begin()
    found.add(second, np.zeros(9))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (first[::2], second[::2]))
    assert found.nats == pytest.approx((p * np.log(p / q)).sum(axis=1).mean(), rel=1e-5)
    found.begin()
    found.add(first + 5, np.zeros(9))
    assert found.nats == pytest.approx(0, abs=1e-6)


def test_layers_that_matter_more_are_cut_less(tmp_path, texts):
    """The second layer's neurons add nothing: it may lose them all before the first loses many."""

    class Deaf(RandomSource):
        def tensor(self, name):
            found = super().tensor(name)
            return Tensor.from_f32(found.to_f32() * 1e-3) if name == "layers.1.ffn.down.weight" else found

    arch = toy_architecture(activation="silu", max_context=48)
    path = convert(Deaf(arch), tmp_path / "deaf", QuantPlan.named("f32"))
    with Engine.open(path, plugins=BUILTINS) as engine:
        calibration = Calibration(engine, texts, 12 * 47)
        calibration.run()
    cuts = calibration.thresholds.curve("product").cuts
    assert np.all(cuts[:, 1] > 3 * cuts[:, 0])
