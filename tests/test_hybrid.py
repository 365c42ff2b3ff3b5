"""Hot clusters on an accelerator, cold neurons beside it: any split computes the dense model."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import offload_models as toys
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.activation_counts import ActivationCounts
from pi2.api import Predictor
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.container.layout import NEURONS
from pi2.container.reader import open_model
from pi2.engine import Engine
from pi2.errors import OptionError, PluginError
from pi2.hot import HotClusters, hottest_first
from pi2.hybrid import HybridOptions, OneAfterTheOther
from pi2.hybrid_setup import beside
from pi2.offload_options import OffloadOptions
from pi2.plugins import Plugins
from pi2.sampling import Sampling
from pi2.statistics_file import STATISTICS, Statistics

PROMPT, DECODED = list(range(40, 52)), [7, 99, 13, 200, 21]
COLD = ["numpy"] + (["cpu:activations=f32"] if "cpu" in toys.BACKENDS else [])
SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)


class Accelerator(NumpyBackend):
    """NumPy in the accelerator's place, one half after the other; fails when it is told to."""

    name = "twin"
    fails: str | None = None
    """What fails from the next call on."""

    def __init__(self) -> None:
        self.power = OneAfterTheOther(self)
        self.asked: list[tuple[str, int, int]] = []
        self.cancelled = 0
        self.released = 0

    def prepare_ffn(self, ffn, tokens, count):
        self.asked.append(("prepare", tokens, count))
        return True

    def begin_ffn(self, ffn, x, count):
        self.asked.append(("begin", len(x), count))
        if self.fails == "begin":
            raise PluginError("the twin does not begin", hint="wait")
        return self.power.begin_ffn(ffn, x, count)

    def finish_ffn(self, ticket, out):
        if self.fails == "finish":
            raise PluginError("the twin is lost", hint="look for it")
        return self.power.finish_ffn(ticket, out)

    def cancel_ffn(self, ticket):
        self.cancelled += 1

    def linear(self, weight, x, out, rows=None):
        if self.fails == "linear":
            raise PluginError("the twin does not multiply", hint="divide")
        super().linear(weight, x, out, rows)

    def release(self, handle):
        self.released += 1


class WithTwin:
    """A plugin that offers ``Accelerator``."""

    PI2_API_VERSION = 1

    @staticmethod
    def hooks() -> Plugins:
        from pi2.hookspecs import hookimpl

        class Module:
            PI2_API_VERSION = 1

            @hookimpl
            def pi2_backends(self):
                return [Accelerator]

        plugins = Plugins.installed()
        plugins.add("twin", Module())
        return plugins


PLUGINS = WithTwin.hooks()


def hybrid(name="relu", *, cold="numpy", offload=None, path=None, predictor="exact", **options):
    options = {"cluster": 16} | options
    return Engine.open(
        path or toys.model(name), backend="twin", storage="mmap", predictor=predictor, plugins=PLUGINS,
        hybrid=HybridOptions(**options), cold=cold, offload=offload,
    )  # fmt: skip


@functools.cache
def dense(name: str) -> np.ndarray:
    with toys.engine(name) as engine:
        return toys.logits(engine, PROMPT, DECODED)


def close(got: np.ndarray, expected: np.ndarray) -> None:
    """Rounding of a few layers, nothing more."""
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max()))


@pytest.mark.parametrize("name", ["relu", "drelu", "silu", "no gate", "biased", "post"])
@settings(deadline=None, max_examples=12)
@given(
    hot=st.sampled_from(SHARES), cluster=st.sampled_from([1, 16, 64, 1000]), cold=st.sampled_from(COLD),
    slots=st.sampled_from([None, toys.NEURONS, 10**6]), attention=st.sampled_from(["cpu", "accelerator"]),
    prefill=st.sampled_from(["cpu", "accelerator"]),
)  # fmt: skip
def test_any_share_on_the_accelerator_gives_the_dense_model(
    name, hot, cluster, cold, slots, attention, prefill
):
    offload = None if slots is None else OffloadOptions(slots=slots)
    options = {"hot": hot, "cluster": cluster, "attention": attention, "prefill": prefill}
    with hybrid(name, cold=cold, offload=offload, **options) as engine:
        close(toys.logits(engine, PROMPT, DECODED), dense(name))
        asked = engine._parts["backend"].asked
        said = engine.setup()["hybrid"]
    count = said["hot_neurons"]
    assert [a for a in asked if a[:2] == ("begin", 1)] == [("begin", 1, count)] * (count > 0) * 2 * len(
        DECODED
    )
    dense_here = prefill == "accelerator" and (slots is None or count == toys.NEURONS)
    assert (("begin", len(PROMPT), toys.NEURONS) in asked) == dense_here
    assert (said["attention"], said["prefill"], said["accelerator"]) == (attention, prefill, "twin")


@settings(deadline=None, max_examples=20)
@given(
    shares=st.lists(st.sampled_from(SHARES), min_size=2, max_size=5),
    slots=st.sampled_from([None, toys.NEURONS]),
)
def test_a_share_that_changes_between_tokens_changes_nothing_else(shares, slots):
    offload = None if slots is None else OffloadOptions(slots=slots)
    with hybrid(hot=shares[0], most=1.0, offload=offload) as engine:
        session, twin = engine.session(), engine._parts["backend"]
        got = [session.logits(PROMPT)]
        for at, token in enumerate(DECODED):
            share = shares[at % len(shares)]
            engine.hybrid.set_share(share)
            del twin.asked[:]
            got.append(session.forward([token])[None])
            count = engine.hybrid.hot.neurons(share)
            each = [("prepare", 1, count), ("begin", 1, count)]  # while attention computes, then after it
            assert twin.asked == each * 2 * (count > 0)
        close(np.concatenate(got), dense("relu"))


def test_hot_neurons_belong_to_the_accelerator_and_never_to_the_cache():
    with hybrid(hot=0.5, offload=OffloadOptions(slots=2 * toys.NEURONS)) as engine:
        toys.logits(engine, PROMPT, DECODED)
        assert engine.offloaded.regions.hot == 2 * 80 * engine.model.geometry.stride
        cache = engine.offloaded.cache
        for ffn in range(2):
            hot = engine.hybrid.hot.orders[ffn][:80]
            assert (cache.slots(ffn, hot) == -1).all()
            assert (cache.slots(ffn, np.arange(80, 160, dtype=np.int32)) >= 0).any()


def test_the_share_has_a_bound_and_whole_clusters():
    with hybrid(hot=0.2, most=0.5) as engine:
        engine.hybrid.set_share(0.52)  # the same number of clusters
        with pytest.raises(OptionError, match="the accelerator has 80 of 160 neurons"):
            engine.hybrid.set_share(0.6)
        toys.logits(engine, PROMPT, DECODED)
        assert engine.setup()["hybrid"]["hot_neurons"] == 80
        twin = engine._parts["backend"]
    assert twin.released == 2


@pytest.mark.parametrize("where", ["begin", "finish", "linear"])
@pytest.mark.parametrize("prefill", ["cpu", "accelerator"])
@pytest.mark.parametrize("cold", COLD)
def test_a_lost_accelerator_stops_the_run_or_leaves_it_to_the_cpu_aloud(where, prefill, cold):
    options = {"hot": 0.5, "prefill": prefill, "attention": "accelerator", "cold": cold}
    with hybrid(**options) as engine:
        engine._parts["backend"].fails = where
        with pytest.raises(PluginError, match="the twin"):
            toys.logits(engine, PROMPT, DECODED)
    for lost_at in (0, 3):
        with hybrid(**options, lost="cpu") as engine:
            session, got = engine.session(), []
            for at, tokens in enumerate([PROMPT, *([token] for token in DECODED)]):
                engine._parts["backend"].fails = where if at >= lost_at else None
                got.append(session.logits(tokens))
            close(np.concatenate(got), dense("relu"))
            assert [
                "the twin" in note and "CPU computes everything" in note for note in engine.notes[1:]
            ] == [True]
            said = engine.setup()["hybrid"]
            assert (said["hot_neurons"], said["attention"], said["prefill"]) == (0, "cpu", "cpu")
            close(toys.logits(engine, PROMPT, DECODED), dense("relu"))


class Broken(Predictor):
    name = "broken"
    lossless = True
    probe = None

    def predict(self, ffn, x):
        raise PluginError("cannot say", hint="guess")


def test_what_the_accelerator_began_is_cancelled_when_the_cpu_fails():
    with hybrid(hot=0.5) as engine:
        engine.decoder.predictor = type("Open", (Broken,), {"probe": classmethod(lambda cls: None)})()
        with pytest.raises(PluginError, match="cannot say"):
            engine.session().forward([3])
        assert engine._parts["backend"].cancelled == 1


def test_statistics_choose_the_hot_clusters_and_their_absence_is_said(tmp_path):
    path = tmp_path / "model"
    shutil.copytree(toys.model("relu"), path)
    model = open_model(path, MmapTier())
    arch, sha = model.architecture, model.manifest.files[NEURONS].sha256
    counts = ActivationCounts.empty(sha, arch.n_layers, arch.n_neurons, sequence=8, batches=(1,))
    active = np.zeros((100, 8, arch.n_neurons), np.bool_)
    active[:, :, ::4] = True
    for layer in range(arch.n_layers):
        counts.add(layer, active)
    counts.finish_group("0" * 64, 100)
    Statistics(counts).save(path / STATISTICS)
    with hybrid(path=path, hot=0.25) as engine:
        assert sorted(engine.hybrid.hot.orders[1][:40]) == list(range(0, 160, 4))
        assert engine.setup()["hybrid"]["clusters_by"] == "statistics"
        assert engine.notes == []
        close(toys.logits(engine, PROMPT, DECODED), dense("relu"))
    with hybrid(hot=0.25) as engine:
        assert "no statistics" in engine.notes[0]
        assert engine.setup()["hybrid"]["clusters_by"] == "number of the neuron"


@settings(deadline=None, max_examples=50)
@given(
    neurons=st.integers(1, 200), cluster=st.integers(1, 70), count=st.integers(0, 200), seed=st.integers(0, 9)
)
def test_hot_and_cold_are_a_partition(neurons, cluster, count, seed):
    rng = np.random.default_rng(seed)
    orders = hottest_first(rng.integers(0, 9, (2, neurons)), 2, neurons)
    hot = HotClusters(orders, cluster)
    hot.resize(1, min(count, neurons))
    cold = hot.cold(1, None)
    cold = np.arange(neurons) if cold is None else cold
    assert sorted([*cold, *orders[1][: hot.count(1)]]) == list(range(neurons))
    some = np.flatnonzero(rng.random(neurons) < 0.5).astype(np.int32)
    assert np.array_equal(hot.cold(1, some), np.intersect1d(some, cold))
    assert hot.cold(0, None) is None
    assert (hot.neurons(0), hot.neurons(1)) == (0, neurons)


@pytest.mark.parametrize("slots", [None, 400])
def test_a_trace_shows_both_halves(tmp_path, slots):
    path = tmp_path / "trace.json"
    offload = None if slots is None else OffloadOptions(slots=slots, trace=path)
    with hybrid(hot=0.5, offload=offload, trace=path) as engine:
        for _ in engine.generate(PROMPT, Sampling(max_tokens=4)):
            pass
        both = engine.setup()["hybrid"]["decode_s"]
        assert both["hot"] > 0 < both["cold"]
        assert both["both"] == 0  # one after the other
    events = [e for e in json.loads(path.read_text()) if e["ph"] == "X"]
    halves = {name: [e for e in events if e["name"] == name] for name in ("hot", "cold")}
    assert len(halves["hot"]) == len(halves["cold"]) == 2 * 3
    assert {e["tid"] for e in halves["hot"]} != {e["tid"] for e in halves["cold"]}
    assert {e["args"]["neurons"] for e in halves["hot"]} == {80}


def test_who_computes_beside_an_accelerator_is_no_accelerator_itself():
    assert beside(PLUGINS, "twin") == ("cpu" if "cpu" in toys.BACKENDS else "numpy")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hot": 1.5}, "1.5 of an FFN cannot be hot"),
        ({"hot": 0.5, "most": 0.4}, "most=0.4 is no bound"),
        ({"attention": "gpu"}, "attention is cpu or accelerator, not 'gpu'"),
        ({"lost": "ignore"}, "lost is stop or cpu, not 'ignore'"),
        ({"cluster": 0}, "a cluster of 0 neurons"),
    ],
)
def test_impossible_options_are_refused(options, says):
    with pytest.raises(OptionError, match=says):
        HybridOptions(**options)
