"""What a trace proves of the native pipeline: no barriers, one thread that reads, and never what is hot."""

import threading
from pathlib import Path

import numpy as np
import offload_models as toys
import pytest
from pi2.powers import Stage

NATIVE = "cpu" in toys.BACKENDS and "ufs:throttle=ufs40" in toys.STORAGES
THROTTLED = {"storage": "ufs:throttle=ufs40", "slots": 170, "cluster": 8, "prefetch": "off"}
pytestmark = pytest.mark.skipif(not NATIVE, reason="no native pipeline can run here")


def events(path: Path, **setup):
    """Spans of some decoded tokens: those of one FFN of one token are one list."""
    with toys.engine("wide", backend="cpu:threads=2", trace=path, **setup) as engine:
        toys.logits(engine, [1, 2], [])
        engine.offloaded.take_count()
        session, calls = engine.session(), []
        session.forward([1, 2])
        engine.offloaded.pipeline.spans()
        for token in range(12):
            session.forward([token])
            spans = engine.offloaded.pipeline.spans()
            calls += [spans[spans["ffn"] == ffn] for ffn in range(engine.model.architecture.n_layers)]
        slots = engine.offloaded.cache._tables.slot_of[0]
        hot, held = np.flatnonzero(slots < engine.offloaded.cache.n_hot), np.flatnonzero(slots >= 0)
        return calls, np.intersect1d(hot, held)


def test_one_cluster_is_through_before_another_has_its_gates(tmp_path):
    """The barrier that matrices would have between them is not there."""

    def early(spans):
        done = spans[(spans["stage"] == Stage.UP_DOWN_COMPUTE)]["end"]
        gates = spans[spans["stage"] == Stage.GATE_COMPUTE]["start"]
        return len(done) > 0 and len(gates) > 0 and done.min() <= gates.max()

    setup = {**THROTTLED, "two_phase": "on"}
    calls, _ = events(tmp_path / "t.json", **setup)
    reading = [spans for spans in calls if (spans["stage"] == Stage.GATE_READ).any()]
    assert len(reading) > 10
    assert np.mean([early(spans) for spans in reading]) > 0.5


def test_computing_goes_on_while_something_is_read_and_without_overlap_it_does_not(tmp_path):
    def meanwhile(spans):
        reads = spans[np.isin(spans["stage"], (Stage.GATE_READ, Stage.UP_DOWN_READ))]
        work = spans[~np.isin(spans["stage"], (Stage.GATE_READ, Stage.UP_DOWN_READ))]
        return any(((reads["start"] < w["start"]) & (w["end"] < reads["end"])).any() for w in work)

    setup = {**THROTTLED, "two_phase": "off"}
    for overlap in (True, False):
        calls, _ = events(tmp_path / "t.json", overlap=overlap, **setup)
        assert any(map(meanwhile, calls)) == overlap


def test_hot_neurons_are_never_read_again_so_nobody_waits_for_them(tmp_path):
    setup = {"storage": "ufs", "slots": 260, "hot": 0.2, "keep": "even", "cluster": 1, "prefetch": "off"}
    calls, hot = events(tmp_path / "t.json", **setup)
    assert len(hot) > 10
    first = np.concatenate(calls[::3])
    reads = first[np.isin(first["stage"], (Stage.GATE_READ, Stage.UP_DOWN_READ))]
    assert len(reads) > 0
    assert not np.isin(reads["cluster"], hot).any()
    named = first[first["stage"] == Stage.GATE_COMPUTE]["cluster"]
    assert np.isin(named, hot).any(), "they were computed"


def test_one_thread_submits_and_reaps_whatever_the_depth():
    tasks = Path("/proc/self/task")
    before = len(list(tasks.iterdir()))
    tier = toys.part("storage_tiers", "ufs:engine=uring,depth=64")
    assert len(list(tasks.iterdir())) - before == 1
    assert threading.active_count() <= before  # and it is none of Python's
    tier.close()


def test_reads_of_a_trace_are_on_the_storage_thread(tmp_path):
    calls, _ = events(tmp_path / "t.json", storage="ufs", slots=170)
    spans = np.concatenate(calls)
    reads = np.isin(spans["stage"], (Stage.GATE_READ, Stage.UP_DOWN_READ))
    assert reads.any()
    assert np.array_equal(spans["thread"] == 255, reads)
    assert set(spans["thread"][~reads].tolist()) <= {0, 1}
