"""The law: wherever the weights are and however they come, the logits have the same bits."""

import functools

import numpy as np
import offload_models as toys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_files import random_predictors
from pi2 import ffns
from pi2.errors import BudgetError, OptionError

POLICIES = list(toys.PLUGINS.of("cache_policies"))
CASES = [(name, backend) for name in toys.ARCHITECTURES for backend in toys.BACKENDS]


def tokens(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 250, n).tolist()


@functools.cache
def resident(name: str, backend: str, n_prompt: int, n_decoded: int) -> bytes:
    with toys.engine(name, backend=backend) as engine:
        return toys.logits(engine, tokens(1, n_prompt), tokens(2, n_decoded)).tobytes()


@st.composite
def setups(draw):
    """Keyword arguments of ``toys.engine``: any storage and any way to run on flash."""
    storage = draw(st.sampled_from(toys.STORAGES))
    ahead = storage != "mmap"
    return {
        "storage": storage,
        "slots": draw(st.sampled_from([toys.NEURONS, toys.NEURONS + 7, 2 * toys.NEURONS, 10**6])),
        "policy": draw(st.sampled_from([*POLICIES, "window:tokens=0"])),
        "hot": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "keep": draw(st.sampled_from(["frequent", "even"])),
        "overlap": draw(st.booleans()),
        "bundled": (bundled := draw(st.booleans())),
        "two_phase": draw(st.sampled_from(["auto", "on", "off"] if bundled else ["auto", "off"])),
        "prefetch": draw(st.sampled_from(["on", "off", "auto"] if ahead else ["off", "auto"])),
        "cluster": draw(st.sampled_from([1, 16, 64])),
        "pipeline": draw(st.sampled_from(["auto", "python"])),
    }


@pytest.mark.parametrize(("name", "backend"), CASES)
@settings(deadline=None, max_examples=8)
@given(setup=setups(), n_prompt=st.sampled_from([1, 2, 30]))
def test_a_model_on_flash_has_the_logits_of_the_resident_one(name, backend, setup, n_prompt):
    with toys.engine(name, backend=backend, **setup) as engine:
        got = toys.logits(engine, tokens(1, n_prompt), tokens(2, 12))
        assert engine.offloaded.cache.resident <= setup["slots"]
    assert got.tobytes() == resident(name, backend, n_prompt, 12)


@pytest.mark.skipif("cpu" not in toys.BACKENDS, reason="pi2-backend-cpu is not installed")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_no_bit(threads):
    with toys.engine(
        "relu", backend=f"cpu:threads={threads}", storage=toys.STORAGES[-1], slots=170
    ) as engine:
        got = toys.logits(engine, tokens(1, 30), tokens(2, 12))
    assert got.tobytes() == resident("relu", "cpu", 30, 12)


@pytest.mark.parametrize("backend", toys.BACKENDS)
@pytest.mark.parametrize("storage", toys.STORAGES[:2])
def test_many_ranges_and_chunks_of_a_prompt_change_no_bit(monkeypatch, backend, storage):
    """Small ranges and chunks, so that a toy model has several: one chunk of them has one token."""
    monkeypatch.setattr(ffns, "RANGE_BYTES", 1)
    monkeypatch.setattr("pi2.session.PREFILL_CHUNK", 8)
    prompt, decoded = tokens(1, 8 * 5 + 1), tokens(2, 3)
    with toys.engine("relu", backend=backend) as engine:
        expected = toys.logits(engine, prompt, decoded)
    with toys.engine("relu", backend=backend, storage=storage, slots=200) as engine:
        got = toys.logits(engine, prompt, decoded)
        assert len(ffns.dense_ranges(engine.model.geometry, toys.NEURONS)) == 3
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("backend", toys.BACKENDS)
@pytest.mark.parametrize("kind", ["lookahead:margin=0", "lowrank:max_loss=1,file="])
@pytest.mark.parametrize("storage", [toys.STORAGES[0], toys.STORAGES[-1]])
def test_a_lossy_predictor_loses_the_same_on_flash(tmp_path, backend, kind, storage):
    if kind.endswith("="):
        kind += str(tmp_path / "p")
        random_predictors(toys.model("relu"), toys.ARCHITECTURES["relu"]).save(tmp_path / "p")
    with toys.engine("relu", backend=backend, predictor=kind) as engine:
        expected = toys.logits(engine, tokens(1, 5), tokens(2, 12))
    how = {"slots": 180, "prefetch": "off" if storage == "mmap" else "on"}
    with toys.engine("relu", backend=backend, predictor=kind, storage=storage, **how) as engine:
        got = toys.logits(engine, tokens(1, 5), tokens(2, 12))
        guesses = storage != "mmap" and kind.startswith("lowrank")
        assert (engine.offloaded.take_count().guessed > 0) == guesses
    assert got.tobytes() == expected.tobytes()
    assert got.tobytes() != resident("relu", backend, 5, 12)


def test_a_cache_that_is_too_small_for_the_model_evicts_and_one_that_holds_it_does_not():
    for slots, fits in ((toys.NEURONS, False), (10**6, True)):
        with toys.engine("relu", slots=slots) as engine:
            toys.logits(engine, tokens(1, 1), tokens(2, 20))
            engine.offloaded.take_count()
            toys.logits(engine, tokens(1, 1), tokens(2, 20))
            count = engine.offloaded.take_count()
            assert (count.present == count.wanted) == fits
            assert (count.stream.bytes_read == 0) == fits


def test_two_phases_read_less_than_one():
    """Of a predictor that names too much: its wrong neurons cost a gate each, not a bundle."""
    read = {}
    for two_phase in ("on", "off"):
        setup = {"predictor": "lookahead:margin=2", "slots": 10**6, "two_phase": two_phase}
        with toys.engine("wide", pipeline="python", prefetch="off", **setup) as engine:
            toys.logits(engine, tokens(1, 1), tokens(2, 1))
            read[two_phase] = engine.offloaded.take_count().stream.bytes_read
    assert read["on"] < 0.8 * read["off"]


def test_the_exact_predictor_names_few_neurons_of_a_sparse_model_on_flash():
    with toys.engine("relu", slots=toys.NEURONS) as engine:
        toys.logits(engine, tokens(1, 1), tokens(2, 10))
        count = engine.offloaded.take_count()
    assert 0 < count.wanted < 0.5 * 2 * toys.NEURONS * 10
    assert count.stream.active <= count.wanted <= 1.1 * count.stream.active


def test_fewer_slots_than_an_ffn_has_neurons_are_refused():
    with pytest.raises(BudgetError, match="100 slots cannot hold an FFN"), toys.engine("relu", slots=100):
        pass


@pytest.mark.parametrize(
    ("setup", "says"),
    [
        ({"hot": 1.5}, "1.5 of an FFN cannot be hot"),
        ({"cluster": 0}, "a cluster of 0 neurons"),
        ({"keep": "odd"}, "keep is frequent or even, not 'odd'"),
        ({"bundled": False, "two_phase": "on"}, "have no two phases"),
        ({"prefetch": "maybe"}, "prefetch is auto, on or off, not 'maybe'"),
        ({"pipeline": "c"}, "pipeline is auto, native or python, not 'c'"),
        ({"two_phase": "perhaps"}, "two_phase is auto, on or off, not 'perhaps'"),
        ({"prefetch": "on"}, "storage mmap cannot read ahead"),
        ({"pipeline": "native"}, "numpy with mmap has no native pipeline"),
    ],
)
def test_impossible_options_are_refused(setup, says):
    with pytest.raises(OptionError, match=says), toys.engine("relu", slots=200, **setup):
        pass
