"""The hot region, look-ahead, the order of dense reads, and a budget that was set too tight."""

import shutil

import numpy as np
import offload_models as toys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2 import budget as budget_module
from pi2 import offload as offload_module
from pi2.activation_counts import ActivationCounts
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.container.layout import DENSE, NEURONS
from pi2.container.reader import open_model
from pi2.engine import Engine
from pi2.errors import BudgetError
from pi2.lookahead import Lookahead
from pi2.memory import rss_peak_bytes
from pi2.offload_options import OffloadOptions
from pi2.powers import SlotState
from pi2.prefill import DenseReader
from pi2.statistics_file import STATISTICS, Statistics

HOT = 40


@pytest.fixture
def with_statistics(tmp_path):
    """``with_statistics(sha)``: a model whose neurons 0, 4, 8, ... are the most often active."""

    def make(sha=None):
        path = tmp_path / "model"
        shutil.copytree(toys.model("relu"), path)
        model = open_model(path, MmapTier())
        arch, sha = model.architecture, sha or model.manifest.files[NEURONS].sha256
        counts = ActivationCounts.empty(sha, arch.n_layers, arch.n_neurons, sequence=8, batches=(1,))
        active = np.zeros((100, 8, arch.n_neurons), np.bool_)
        active[:, :, ::4] = True
        active[0, 0, 1] = True
        for layer in range(arch.n_layers):
            counts.add(layer, active)
        counts.finish_group("0" * 64, 100)
        Statistics(counts).save(path / STATISTICS)
        return path

    return make


def opened(path, **options):
    return Engine.open(path, backend="numpy", storage="mmap", plugins=toys.PLUGINS, verify=False,
                       offload=OffloadOptions(**options))  # fmt: skip


def test_the_hot_region_holds_the_most_active_neurons_for_ever(with_statistics):
    with opened(with_statistics(), slots=toys.NEURONS + 2 * HOT, hot=HOT / 320) as engine:
        cache, model = engine.offloaded.cache, engine.model
        hot = np.arange(0, toys.NEURONS, 4, dtype=np.int32)
        assert cache.n_hot == HOT
        assert engine.offloaded.regions.hot == HOT * model.geometry.stride
        for _ in range(2):
            slots = cache.slots(0, hot)
            assert (slots < HOT).all()
            assert (cache.states[slots] == SlotState.PRESENT).all()
            assert np.array_equal(cache.slab[slots], model.bundles(0)[hot])
            got = toys.logits(engine, [1, 2, 3], list(range(20)))  # what is cold comes and goes
    with toys.engine("relu") as engine:
        assert got.tobytes() == toys.logits(engine, [1, 2, 3], list(range(20))).tobytes()


def test_hot_zero_keeps_nothing_and_foreign_statistics_are_not_used(with_statistics):
    with opened(with_statistics("f" * 64), slots=300) as engine:
        assert engine.offloaded.cache.n_hot == 0
        assert any("is of another model" in note for note in engine.notes)
    with toys.engine("relu", slots=300, hot=0.0) as engine:
        assert engine.offloaded.cache.n_hot == 0


@pytest.mark.skipif(len(toys.STORAGES) < 2, reason="no storage here reads ahead")
def test_look_ahead_guesses_and_counts_what_it_was_right_about():
    with toys.engine("wide", storage="ufs", slots=240, prefetch="on") as engine:
        toys.logits(engine, [1], list(range(30)))
        count = engine.offloaded.take_count()
    assert 0 < count.useful <= count.guessed
    with toys.engine("wide", storage="ufs", slots=240, prefetch="off") as engine:
        toys.logits(engine, [1], list(range(30)))
        assert engine.offloaded.take_count().guessed == 0


@pytest.mark.skipif(len(toys.STORAGES) < 2, reason="no storage here reads ahead")
def test_look_ahead_is_tried_once_the_cache_is_full():
    with toys.engine("wide", storage="ufs", slots=240) as engine:
        toys.logits(engine, [1], [7] * 31)
        assert engine.offloaded.take_count().guessed == 0
        toys.logits(engine, [1], list(range(40)))
        assert engine.offloaded.take_count().guessed > 0


@pytest.mark.parametrize("pays", [True, False])
def test_look_ahead_goes_on_only_if_tokens_with_it_take_less_time(monkeypatch, pays):
    """By a clock of this test: a token with guesses takes 1 or 3 seconds, one without takes 2."""
    clock = [0.0]
    monkeypatch.setattr("pi2.lookahead.time.perf_counter", lambda: clock[0])
    ahead = Lookahead(open_model(toys.model("relu"), MmapTier()), "auto")
    chosen = []
    for _ in range(200):
        ahead.next_token()
        chosen.append(ahead.on)
        clock[0] += (1 if pays else 3) if ahead.on else 2
    assert set(chosen[:32]) == {False}  # while the cache fills
    assert set(chosen[32:64]) == {True, False}  # tried both ways
    assert set(chosen[65:]) == {pays}


@given(st.lists(st.floats(0, 9), min_size=1, max_size=60), st.lists(st.booleans(), max_size=30))
def test_look_ahead_asks_for_the_surest_and_for_fewer_after_wrong_guesses(sure, tokens):
    ahead = Lookahead(open_model(toys.model("relu"), MmapTier()), "on")
    confidence = np.array(sure, np.float32)
    neurons = np.arange(3, 3 + len(sure), dtype=np.int32)
    before = len(ahead.surest(neurons, confidence))
    for right in [*tokens, *[False] * 40]:
        ahead.learn(100, 100 if right else 10)
        ahead.next_token()
        chosen = ahead.surest(neurons, confidence)
        rest = np.setdiff1d(neurons, chosen)
        assert np.all(np.diff(chosen) > 0)
        assert len(chosen) > 0
        assert not len(rest) or confidence[rest - 3].max() < confidence[chosen - 3].min()
        assert len(chosen) >= before if right else len(chosen) <= before
        before = len(chosen)
    assert len(chosen) == np.count_nonzero(confidence == confidence.max())
    assert ahead.surest(neurons, None).tolist() == neurons.tolist()


def test_a_cache_smaller_than_a_token_wants_is_warned_about():
    with toys.engine("silu", slots=toys.NEURONS) as engine:
        for tokens in ([2], [3, 4]):  # said once, though other tokens want other numbers
            toys.logits(engine, [1], tokens)
            engine.offloaded.take_count()
        assert [note[:41] for note in engine.notes[1:]] == ["the cache holds 160 neurons, a token want"]


def test_a_process_above_its_budget_gives_slots_up(monkeypatch):
    with toys.engine("relu", slots=toys.NEURONS + 100, memory=None) as engine:
        ffns = engine.offloaded
        toys.logits(engine, [1], list(range(30)))
        ffns.options = OffloadOptions(memory=10**9)
        monkeypatch.setattr(offload_module, "rss_bytes", lambda: 10**9 + 10 * ffns.cache.slab.shape[1])
        ffns.take_count()
        assert ffns.cache.capacity == toys.NEURONS + 90
        for _ in range(20):
            ffns.take_count()
        assert ffns.cache.capacity == toys.NEURONS
        assert any("more memory than the budget is in use" in note for note in engine.notes)
        got = toys.logits(engine, [1], list(range(30)))
    with toys.engine("relu") as engine:
        assert got.tobytes() == toys.logits(engine, [1], list(range(30))).tobytes()


@pytest.mark.skipif("ufs:throttle=ufs40" not in toys.STORAGES, reason="ufs cannot run here")
@pytest.mark.parametrize("backend", toys.BACKENDS)
def test_slots_are_not_given_up_while_an_unfinished_token_reads_into_them(monkeypatch, backend):
    steps, how = list(range(30)), {"storage": "ufs:throttle=ufs40", "slots": toys.NEURONS + 100}

    def interrupt(ffn, x):
        if ffn == 1 and len(x) == 1:
            raise KeyboardInterrupt

    with toys.engine("wide", backend=backend, prefetch="on", **how) as engine:
        ffns = engine.offloaded
        toys.logits(engine, [1], steps)
        engine.decoder.observer = interrupt
        with pytest.raises(KeyboardInterrupt):
            toys.logits(engine, [1], steps)
        assert ffns.lookahead.pending
        ffns.options = OffloadOptions(memory=10**9)
        monkeypatch.setattr(offload_module, "rss_bytes", lambda: 10**9 + 90 * ffns.cache.slab.shape[1])
        ffns.take_count()
        assert ffns.cache.capacity == toys.NEURONS + 10
        assert not np.any(ffns.cache.states == SlotState.LOADING)
        engine.decoder.observer = None
        got = toys.logits(engine, [1], steps)
    with toys.engine("wide", backend=backend) as engine:
        assert got.tobytes() == toys.logits(engine, [1], steps).tobytes()


def test_what_the_estimate_left_of_the_budget_becomes_slots(monkeypatch):
    with toys.engine("relu", slots=toys.NEURONS + 100) as engine:
        ffns, margin = engine.offloaded, offload_module._MARGIN
        cache, stride = ffns.cache, ffns.cache.slab.shape[1]
        toys.logits(engine, [1], [])
        cache.resize(toys.NEURONS + 40)  # what an estimate that was too high would have left
        monkeypatch.setattr(offload_module, "rss_bytes", lambda: 10**9 - margin - 10 * stride - stride // 2)
        ffns.options = OffloadOptions(memory=10**9)
        ffns.take_count()
        assert cache.untouched > 10  # memory that is not taken yet is not left over
        assert cache.capacity == toys.NEURONS + 40
        got = toys.logits(engine, [1], list(range(30)))
        left = cache.untouched
        assert left <= 1
        ffns.take_count()
        assert cache.capacity == toys.NEURONS + 50 - left
    with toys.engine("relu") as engine:
        assert got.tobytes() == toys.logits(engine, [1], list(range(30))).tobytes()


@pytest.fixture
def outside(monkeypatch):
    """Bytes of another process that the NumPy backend is said to have."""
    found = {"now": 0}
    monkeypatch.setattr(NumpyBackend, "outside_bytes", lambda self: found["now"], raising=False)
    monkeypatch.setattr(NumpyBackend, "outside_bytes_for", lambda self, weights: 7 * weights, raising=False)
    return found


def test_memory_of_other_processes_is_planned_for_and_counts_in_the_budget(outside, monkeypatch):
    budget = rss_peak_bytes() + 10**9  # whatever the tests before had in memory
    with toys.engine("relu", memory=budget) as engine:
        ffns = engine.offloaded
        assert "outside_bytes" not in engine.setup()
        assert ffns.regions.fixed >= 7 * engine.model.resident_bytes
        outside["now"] = budget
        capacity = ffns.cache.capacity
        ffns.take_count()
        assert engine.setup()["outside_bytes"] == budget
        assert toys.NEURONS <= ffns.cache.capacity < capacity
    monkeypatch.setattr(NumpyBackend, "outside_bytes_for", lambda self, weights: budget)
    with pytest.raises(BudgetError, match=r"needs at least \d+ MB"), toys.engine("relu", memory=budget):
        pass


@settings(deadline=None, max_examples=30)
@given(steps=st.lists(st.sampled_from([1, 2, 8, 40]), min_size=1, max_size=6), prefetch=st.booleans())
def test_regions_follow_the_batch_and_change_no_bit(steps, prefetch):
    """Many tokens together take slots from the cold region, which has them back when they come one by one."""
    ids = np.random.default_rng(0).integers(0, 250, sum(steps)).tolist()
    name = toys.STORAGES[1] if prefetch and len(toys.STORAGES) > 1 else "mmap"
    with toys.engine("relu") as plain, toys.engine("relu", storage=name, slots=290) as engine:
        ffns, arch, g = engine.offloaded, engine.model.architecture, engine.model.geometry
        taken = budget_module.batch_bytes(arch, g, max(steps), 256)
        ffns._room = budget_module.Room(arch, g, chunk=256, fixed=0, slots=290,
                                        memory=(toys.NEURONS + 1) * (g.stride + 14) + taken)  # fmt: skip
        ours, theirs, at = engine.session(), plain.session(), 0
        for n in steps:
            expected = theirs.forward(ids[at : at + n])
            assert ours.forward(ids[at : at + n]).tobytes() == expected.tobytes()
            at += n
            assert ffns.cache.capacity == ffns._room.slots(n)
            regions = ffns.regions
            assert regions.fixed + regions.hot + regions.cold == regions.budget
            assert ffns.cache.resident <= ffns.cache.capacity
        sizes = [ffns._room.slots(n) for n in (1, 2, 8, 40) if n <= max(steps)]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("name", "tied"), [("relu", True), ("untied", False)])
def test_embeddings_are_read_row_by_row_unless_the_head_is_made_of_them(name, tied):
    with toys.engine(name, slots=200) as engine:
        model, ids = engine.model, np.array([3, 0, 3, 7], np.int32)
        table = model.matrix("embed.weight").data
        assert model.by_rows("embed.weight") == (not tied)
        assert np.array_equal(model.rows("embed.weight", ids).data, table[ids])
        assert model.manifest.files[DENSE].nbytes - model.resident_bytes == (0 if tied else table.nbytes)


@pytest.mark.parametrize("storage", toys.STORAGES[:2])
def test_dense_reads_come_in_order_and_can_be_left_at_any_point(storage):
    tier = toys.part("storage_tiers", storage)
    model = open_model(toys.model("relu"), tier, views=False)
    places = [model.ffn_place(ffn) for ffn in range(2)]
    reader = DenseReader(tier, places, [(0, 64), (64, 128), (128, 160)], model.geometry.stride)
    for first, _ in reader.bundles(0):
        if first == 64:
            break
    for ffn in (1, 0, 0, 1):  # also out of order: what was read ahead is given up
        parts = [bundles.copy() for _, bundles in reader.bundles(ffn)]
        assert np.array_equal(np.concatenate(parts), model.bundles(ffn))
    assert reader.take_count().bytes_read >= 4 * model.bundles(0).nbytes
    reader.stop()
    tier.close()
