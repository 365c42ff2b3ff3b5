"""The trained predictor's arithmetic and its options; training has tests of its own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_files import install, model_hash, random_predictors, right_predictors
from pi2.activation_counts import ActivationCounts
from pi2.activity import active_neurons
from pi2.api import FfnSpec
from pi2.builtin.lowrank_predictor import LowRankPredictor
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.config import Settings
from pi2.container import open_model
from pi2.engine import Engine
from pi2.errors import FormatError, OptionError
from pi2.evaluate import evaluate
from pi2.offload_options import OffloadOptions
from pi2.plugins import Plugins
from pi2.powers import SupportsOffload
from pi2.statistics_file import STATISTICS, Statistics
from pi2.testing.backend import call_ffn, same_bits
from pi2.testing.models import ffn_inputs, toy_architecture, write_toy_model
from pi2.testing.strategies import generators

BUILTINS = Plugins.installed(Settings(plugins=frozenset()))
ARCH = toy_architecture(n_layers=12)
BACKEND = NumpyBackend.open()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_toy_model(tmp_path_factory.mktemp("models") / "toy", ARCH, quant="f32")


@pytest.fixture(scope="module")
def model(path):
    tier = MmapTier()
    yield open_model(path, tier)
    tier.close()


@pytest.fixture(scope="module")
def random_file(path, tmp_path_factory):
    file = tmp_path_factory.mktemp("predictors") / "p"
    random_predictors(path, ARCH, dtype="f32").save(file)
    return str(file)


@pytest.fixture(scope="module")
def random_one(model, random_file):
    predictor = LowRankPredictor.open({"file": random_file})
    predictor.attach(model, BACKEND)
    yield predictor
    predictor.close()


@settings(deadline=None, max_examples=40)
@given(generators, st.sampled_from((0, 1, 2, 7)), st.integers(0, 11))
def test_it_names_what_the_formula_names_for_any_row(path, random_one, rng, n, ffn):
    layer = random_predictors(path, ARCH, dtype="f32").layers[ffn]
    x = ffn_inputs(ARCH, n, rng)
    hidden = np.maximum(x @ layer.fc1.to_f32().T + layer.fc1_bias, 0)
    scores = hidden @ layer.fc2.to_f32().T + layer.fc2_bias
    ids = random_one.predict(ffn, x)
    far = np.abs(scores) > 1e-4  # nearer ones are rounding's choice
    named = np.isin(np.arange(ARCH.n_neurons), ids)
    assert ids.dtype == np.int32
    assert named[((scores > 0) & far).any(axis=0)].all()
    assert not named[((scores < 0) & far).all(axis=0)].any()


@settings(deadline=None, max_examples=30)
@given(generators, st.integers(0, 11))
def test_a_batch_names_the_union_of_its_rows(random_one, rng, ffn):
    x = ffn_inputs(ARCH, 5, rng)
    single = [random_one.predict(ffn, row[None]) for row in x]
    assert random_one.predict(ffn, x).tolist() == np.unique(np.concatenate(single)).tolist()


@settings(deadline=None, max_examples=30)
@given(generators, st.floats(0, 1), st.integers(0, 11))
def test_any_superset_of_the_active_gives_the_dense_output_exactly(model, rng, share, ffn):
    handle = BACKEND.place_ffn(model.bundles(ffn), FfnSpec(model.geometry, ARCH.activation))
    x = ffn_inputs(ARCH, 1, rng)
    active = active_neurons(model, ffn, x)[0]
    dense, count = call_ffn(BACKEND, handle, x)
    rows = np.flatnonzero(active | (rng.random(ARCH.n_neurons) < share)).astype(np.int32)
    sparse, counted = call_ffn(BACKEND, handle, x, rows)
    assert same_bits(sparse, dense)
    assert counted == count


@settings(deadline=None, max_examples=30)
@given(generators, st.floats(0, 1), st.integers(0, 11))
def test_any_subset_lacks_the_terms_of_the_missing_neurons_and_nothing_else(model, rng, share, ffn):
    handle = BACKEND.place_ffn(model.bundles(ffn), FfnSpec(model.geometry, ARCH.activation))
    x = ffn_inputs(ARCH, 1, rng)
    kept = rng.random(ARCH.n_neurons) < share
    dense, _ = call_ffn(BACKEND, handle, x)
    some, _ = call_ffn(BACKEND, handle, x, np.flatnonzero(kept).astype(np.int32))
    others, _ = call_ffn(BACKEND, handle, x, np.flatnonzero(~kept).astype(np.int32))
    assert np.allclose(some + others, dense, rtol=0, atol=1e-5)


def test_a_predictor_that_is_right_loses_nothing(path, tmp_path):
    install(path, right_predictors(path))
    text = tmp_path / "a.txt"
    text.write_text("She sells sea shells on the sea shore. " * 4)
    with Engine.open(path, predictor="lowrank", plugins=BUILTINS) as engine:
        found = evaluate(engine, [text], tokens=64, sequence=32)
        assert not engine.setup()["lossless"]
    assert found.agreement == 1
    assert found.loss == pytest.approx(0, abs=1e-6)
    assert found.overall().recall == pytest.approx(1, abs=1e-3)
    assert found.overall().predicted_density == pytest.approx(found.overall().density, abs=1e-3)


def test_a_lower_shift_names_more(model, random_file, random_one):
    lower = LowRankPredictor.open({"file": random_file, "shift": "-1.0"})
    lower.attach(model, BACKEND)
    x = ffn_inputs(ARCH, 1, np.random.default_rng(0))
    for ffn in range(ARCH.n_layers):
        few, many = random_one.predict(ffn, x).tolist(), lower.predict(ffn, x).tolist()
        assert set(few) < set(many)
    assert "thresholds -1" in lower.describe()


def test_rare_neurons_have_thresholds_of_their_own(path, model, random_file, random_one, tmp_path):
    options = {"file": random_file, "rare": "0.25"}
    with pytest.raises(OptionError, match="no statistics") as refusal:
        LowRankPredictor.open(options).attach(model, BACKEND)
    assert "pi2 collect" in refusal.value.hint
    counts = ActivationCounts.empty(model_hash(path), ARCH.n_layers, ARCH.n_neurons, sequence=8, batches=(1,))
    active = np.zeros((20, 8, ARCH.n_neurons), np.bool_)
    active[:, :, ::4] = True  # the others fire never
    for layer in range(ARCH.n_layers):
        counts.add(layer, active)
    counts.finish_group("0" * 64, 20)
    Statistics(counts).save(path / STATISTICS)
    try:
        careful = LowRankPredictor.open(options)
        careful.attach(model, BACKEND)
        less = LowRankPredictor.open({"file": random_file, "shift": "0.25"})
        less.attach(model, BACKEND)
    finally:
        (path / STATISTICS).unlink()
    assert "of rare neurons +0.25" in careful.describe()
    x = ffn_inputs(ARCH, 1, np.random.default_rng(0))
    for ffn in range(ARCH.n_layers):
        usual, few = random_one.predict(ffn, x), less.predict(ffn, x)
        assert len(few) < len(usual)
        expected = np.union1d(usual[usual % 4 == 0], few[few % 4 != 0])
        assert careful.predict(ffn, x).tolist() == expected.tolist()
        named, sure = careful.rank(ffn, x)
        assert named.tolist() == expected.tolist()
        assert np.all(sure > 0)


def test_a_layer_without_a_predictor_gets_all_neurons(path, model, tmp_path):
    made = random_predictors(path, ARCH)
    del made.layers[4]
    made.save(tmp_path / "p")
    predictor = LowRankPredictor.open({"file": str(tmp_path / "p")})
    predictor.attach(model, BACKEND)
    x = ffn_inputs(ARCH, 1, np.random.default_rng(0))
    assert predictor.predict(4, x) is None
    assert predictor.predict(5, x) is not None


def test_predictors_that_lost_too_much_are_refused_unless_that_is_allowed(path, model, tmp_path):
    made = random_predictors(path, ARCH)
    made.loss = 0.034
    made.save(tmp_path / "p")
    file = {"file": str(tmp_path / "p")}
    with pytest.raises(OptionError, match=r"lost 3\.40% of perplexity.* 1\.00% allowed") as refusal:
        LowRankPredictor.open(file).attach(model, BACKEND)
    assert "lowrank:max_loss=0.034" in refusal.value.hint
    allowed = LowRankPredictor.open({**file, "max_loss": "0.034"})
    allowed.attach(model, BACKEND)
    assert "perplexity +3.400%" in allowed.describe()
    assert "measured recall 75.00% at density 50.0% for 20.0%" in allowed.describe()


def test_a_model_without_predictors_says_how_to_get_them(tmp_path):
    bare = write_toy_model(tmp_path / "bare")
    with pytest.raises(FormatError, match="no predictors") as refusal:
        Engine.open(bare, predictor="lowrank", plugins=BUILTINS)
    assert "pi2 train-predictor" in refusal.value.hint


@pytest.mark.parametrize(
    "options", [{"shift": "nan"}, {"rare": "inf"}, {"max_loss": "-1"}, {"max_loss": "nan"}]
)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(OptionError):
        LowRankPredictor.open(options)


def test_a_model_on_flash_counts_its_predictors_and_computes_the_same(path, tmp_path):
    install(path, random_predictors(path, ARCH))
    file = path / "predictors.safetensors"
    ids = [256, *range(40, 60)]
    found = []
    for offload in (None, OffloadOptions(slots=ARCH.n_neurons)):
        with Engine.open(path, predictor="lowrank", plugins=BUILTINS, offload=offload) as engine:
            predictor = LowRankPredictor()
            assert isinstance(predictor, SupportsOffload)
            assert predictor.offloaded_bytes(engine.model) == file.stat().st_size
            session = engine.session()
            session.forward(ids)
            found.append(session.forward([65]))
    assert same_bits(*found)
