"""Training predictors on toy models: what it promises, and that stopping and starting changes nothing."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from lowrank_toys import BUILTINS, KINDS, write_kinds
from pi2.activity import active_neurons
from pi2.builtin.lowrank_predictor import LowRankPredictor
from pi2.container import Predictors
from pi2.engine import Engine
from pi2.errors import BudgetError, FormatError, OptionError, StorageError
from pi2.lowrank import inputs as inputs_module
from pi2.lowrank.training import Training, TrainSettings
from pi2.testing.models import toy_architecture, write_toy_model

QUICK = TrainSettings(tokens=1024, recall=0.9, max_loss=None, steps=30)
QUIET = lambda what, done, total: None  # noqa: E731


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_kinds(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    rng = np.random.default_rng(0)
    words = ["sea", "shells", "shore", "she", "sells", "on", "the", "rain", "falls", "heavy", "drops", "of"]
    found = []
    for name in ("a", "b"):
        found.append(tmp_path_factory.mktemp("texts") / name)
        found[-1].write_text(" ".join(rng.choice(words, 300)))
    return found


def train(path, texts, directory, wanted=QUICK, stop_at=None):
    """Predictors; ``stop_at``: Ctrl-C at the n-th sign of progress."""
    left = [stop_at]

    def progress(what, done, total):
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

    with (
        Engine.open(path, predictor="exact", plugins=BUILTINS) as engine,
        Training(engine, texts, wanted, directory) as training,
    ):
        training.collect(progress)
        training.train(progress)
        return training.measure(progress)


def file_of(found, tmp_path):
    found.save(tmp_path / "file")
    return (tmp_path / "file").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(models, texts, tmp_path_factory):
    """The file of a run that nothing stopped."""
    where = tmp_path_factory.mktemp("undisturbed")
    return file_of(train(models["relu"], texts, where / "partial"), where)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_name_the_share_of_the_active_that_was_asked_for(models, texts, tmp_path, kind):
    found = train(models[kind], texts, tmp_path / "partial")
    assert sorted(found.layers) == list(range(toy_architecture(**KINDS[kind]).n_layers))
    assert found.loss is None
    for layer in found.layers.values():
        m = layer.measured
        assert m.recall >= 0.9
        assert m.density > 0.02
        assert 0.8 * m.density < m.predicted_density < 3 * m.density  # far better than chance
        assert layer.fc1.dtype == layer.fc2.dtype == "q4_0"


def test_what_was_measured_is_what_the_predictor_does(models, texts, tmp_path):
    """Asked neuron by neuron on the text that was held out, with the file read back."""
    path, wanted = models["relu"], dataclasses.replace(QUICK, dtype="q8_0")
    with Engine.open(path, predictor="exact", plugins=BUILTINS) as engine:
        with Training(engine, texts, wanted, tmp_path / "partial") as training:
            training.collect(QUIET)
            training.train(QUIET)
            training.measure(QUIET).save(tmp_path / "p")
            held = [training._inputs.layer(n)[1] for n in range(3)]
        predictor = LowRankPredictor.open({"file": str(tmp_path / "p")})
        predictor.attach(engine.model, engine.backend)
        layers = Predictors.load(tmp_path / "p", engine.model.architecture, training._hash).layers
        for n, x in enumerate(held):
            active = active_neurons(engine.model, n, x)
            named = np.zeros_like(active)
            for row, token in zip(named, x, strict=True):
                row[predictor.predict(n, token[None])] = True
            m = layers[n].measured
            assert m.recall == pytest.approx((active & named).sum() / active.sum(), abs=2e-3)
            assert m.predicted_density == pytest.approx(named.mean(), abs=2e-3)
            assert m.density == active.mean()


@pytest.mark.parametrize("stop_at", [3, 9, 12])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(models, texts, tmp_path, undisturbed, stop_at):
    """8 sequences, then 3 layers that are looked at, then 3 that are trained."""
    with pytest.raises(KeyboardInterrupt):
        train(models["relu"], texts, tmp_path / "two", stop_at=stop_at)
    assert file_of(train(models["relu"], texts, tmp_path / "two"), tmp_path) == undisturbed


def test_the_seed_decides(models, texts, tmp_path, undisturbed):
    assert file_of(train(models["relu"], texts, tmp_path / "same"), tmp_path) == undisturbed
    other = train(models["relu"], texts, tmp_path / "other", dataclasses.replace(QUICK, seed=1))
    other.training["seed"] = "0"
    assert file_of(other, tmp_path) != undisturbed


def test_other_settings_begin_anew(models, texts, tmp_path):
    train(models["relu"], texts, tmp_path / "p")
    wide = train(models["relu"], texts, tmp_path / "p", dataclasses.replace(QUICK, width=64, seed=3))
    assert [layer.width for layer in wide.layers.values()] == [64, 64, 64]
    (tmp_path / "p" / "layer-1").write_bytes(b"torn")
    again = train(models["relu"], texts, tmp_path / "p", dataclasses.replace(QUICK, width=64, seed=3))
    assert file_of(again, tmp_path) == file_of(wide, tmp_path)


def test_a_loss_beyond_what_is_allowed_raises_recalls_where_that_helps(models, texts, tmp_path):
    """A loss is a divergence: never below zero, and the smaller the less is missed."""

    def within(loss):
        wanted = dataclasses.replace(QUICK, max_loss=loss)
        return train(models["relu"], texts, tmp_path / "p", wanted)  # trained once, measured again

    some, plain = within(10.0), within(None)
    assert [layer.threshold for layer in some.layers.values()] == [
        layer.threshold for layer in plain.layers.values()
    ]
    fewer, none = within(some.loss / 3), within(-1.0)
    assert 0 <= none.loss < fewer.loss <= some.loss / 3
    for a, b, c in zip(*(found.layers.values() for found in (some, fewer, none)), strict=True):
        assert a.threshold >= b.threshold >= c.threshold
        assert c.measured.recall >= 0.999 > 0.95 > a.measured.recall


def test_a_second_training_in_the_same_place_waits_for_the_first(models, texts, tmp_path):
    with Engine.open(models["relu"], predictor="exact", plugins=BUILTINS) as engine:
        second = Training(engine, texts, QUICK, tmp_path / "p")
        with (
            Training(engine, texts, QUICK, tmp_path / "p"),
            pytest.raises(StorageError, match="another training"),
        ):
            second.__enter__()
        with Training(engine, texts, QUICK, tmp_path / "p") as training:
            training.discard()
    assert not (tmp_path / "p").exists()
    with pytest.raises(StorageError, match="No such file"):
        train(models["relu"], texts, tmp_path / "nowhere" / "p")


def test_a_disk_too_small_is_noticed_first(models, texts, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(inputs_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BudgetError, match="has 1000 free") as refusal:
        train(models["relu"], texts, tmp_path / "p")
    assert "--tokens" in refusal.value.hint


def test_what_cannot_be_trained_is_refused(models, texts, tmp_path):
    dense = write_toy_model(tmp_path / "silu", toy_architecture(activation="silu"))
    with pytest.raises(OptionError, match="silu has no exact zeros"):
        train(dense, texts, tmp_path / "p")
    with pytest.raises(OptionError, match="too few"):
        train(models["relu"], texts, tmp_path / "p", dataclasses.replace(QUICK, tokens=200))
    odd = write_toy_model(
        tmp_path / "odd", toy_architecture(d_model=48, n_heads=3, n_kv_heads=1), quant="f16"
    )
    with pytest.raises(FormatError, match="cannot be stored as q4_0"):
        train(odd, texts, tmp_path / "p")


@pytest.mark.parametrize("wrong", [{"recall": 0.2}, {"recall": 1.0}, {"width": 33}, {"width": 0}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(OptionError):
        TrainSettings(**wrong)


def test_nothing_imports_torch_before_it_trains():
    code = (
        "import sys, pi2.cli.app, pi2.cli.train_predictor, pi2.lowrank.training, pi2.lowrank.imports;"
        "import pi2.builtin.lowrank_predictor; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_first_token_that_attention_leans_on_keeps_its_neurons(models, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("pi2.lowrank.closed_form._SPOILS", 0.0)  # whatever is missed spoils
    found = train(models["relu"], texts, tmp_path / "p")
    for layer in found.layers.values():
        assert layer.measured.recall == 1
        assert (layer.fc2_bias == np.float32(1e30)).any()
    predictor = LowRankPredictor.open()
    with Engine.open(models["relu"], predictor="exact", plugins=BUILTINS) as engine:
        predictor.use(found, engine.backend)
        named = predictor.predict(0, np.zeros((1, 64), np.float32))
        assert set(np.flatnonzero(found.layers[0].fc2_bias == np.float32(1e30))) <= set(named)
        predictor.close()
