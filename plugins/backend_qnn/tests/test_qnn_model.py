"""Whole models on the emulator: alone, and with the hot clusters there and the rest on the CPU."""

import json
import time

import numpy as np
import pytest
from command_line import pi2
from pi2.engine import Engine
from pi2.errors import BudgetError, PluginError
from pi2.hybrid import HybridOptions
from pi2.memory import rss_bytes
from pi2.offload_options import OffloadOptions
from pi2.sampling import Sampling
from pi2_backend_qnn.backend import QnnBackend
from pi2_backend_qnn.probe import probe
from qnn_models import PROMPT, QNN

pytestmark = pytest.mark.skipif(not probe(), reason=probe().reason)


@pytest.fixture(scope="module")
def dense(model):
    with Engine.open(model, backend="numpy", predictor="exact") as engine:
        return engine.logits(PROMPT), tokens(engine)


def tokens(engine):
    generation = engine.generate(PROMPT, Sampling(max_tokens=6))
    for _ in generation:
        pass
    return generation.stats.tokens


def far(got, want):
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def test_a_model_on_the_npu_alone_has_the_logits_of_the_dense_model(model, dense):
    """Prefill by a graph of 32 rows, decoding by one of a single row."""
    with Engine.open(model, backend=QNN, predictor="exact") as engine:
        session = engine.session()
        many = session.logits(PROMPT[:8])
        one = np.concatenate([session.logits([token]) for token in PROMPT[8:]])
        assert far(np.concatenate((many, one)), dense[0]) < QnnBackend.tolerance
        setup = engine.setup()
        assert setup["emulated"]
        assert "EMULATED" in setup["config"]["parts"]["backend"]


@pytest.mark.parametrize("hot", [0.2, 0.6, 1.0])
def test_hot_on_the_npu_and_cold_on_the_cpu_is_the_dense_model(model, dense, tmp_path, hot):
    trace = tmp_path / "trace.json"
    shared = HybridOptions(hot=hot, cluster=32, prefill="accelerator", trace=trace)
    with Engine.open(model, backend=QNN, cold="numpy", predictor="exact", hybrid=shared) as engine:
        assert far(engine.logits(PROMPT), dense[0]) < QnnBackend.tolerance
        assert tokens(engine) == dense[1]
        graphs = engine.setup()["hybrid"]["graphs"]
    events = json.loads(trace.read_text())
    spans = {name: [e for e in events if e["name"] == name] for name in ("hot", "cold", "graph")}
    assert graphs["used"] == len(spans["graph"]) == 2 * 2  # layers times prefill and decode
    assert {e["args"]["neurons"] for e in spans["graph"]} == {160, round(hot * 160)}
    assert {e["tid"] for e in spans["graph"]}.isdisjoint(e["tid"] for e in spans["hot"] + spans["cold"])
    assert len(spans["hot"]) > len(spans["cold"]) == 2 * 5


def test_the_ratio_changes_while_tokens_are_made(model, dense):
    shared = HybridOptions(hot=0.2, most=1.0, cluster=32)
    with Engine.open(model, backend=QNN, cold="numpy", predictor="exact", hybrid=shared) as engine:
        session, logits = engine.session(), []
        for number, token in enumerate(PROMPT):
            engine.hybrid.set_share((0.2, 0.6, 1.0)[number // 4])
            logits.append(session.logits([token]))
        assert far(np.concatenate(logits), dense[0]) < QnnBackend.tolerance
        assert engine.setup()["hybrid"]["graphs"]["used"] >= 2 * 2


def test_hot_neurons_come_from_flash_where_the_rest_stays(model, dense):
    offload = OffloadOptions(slots=300)
    shared = HybridOptions(hot=0.6, cluster=32)
    with Engine.open(
        model, backend=QNN, cold="numpy", predictor="exact", hybrid=shared, offload=offload
    ) as engine:
        assert tokens(engine) == dense[1]


def test_the_memory_of_the_process_with_qnn_counts_in_the_budget(model):
    shared = HybridOptions(hot=0.6, cluster=32)

    def opened(memory):
        offload = OffloadOptions(memory=memory)
        return Engine.open(
            model, backend=QNN, cold="numpy", predictor="exact", hybrid=shared, offload=offload, context=64
        )

    with opened(2 * 10**9) as engine:
        tokens(engine)
        taken, budget = engine.setup()["outside_bytes"], engine.setup()["budget_bytes"]
        assert taken == engine.hybrid._accelerator.outside_bytes() > 50 * 10**6
        assert engine.offloaded.regions.fixed >= rss_bytes() + taken
        assert rss_bytes() + taken <= budget
        assert engine.hybrid._accelerator.outside_bytes_for(0) >= taken
        least = rss_bytes()
    with pytest.raises(BudgetError), opened(least + 200 * 10**6):
        pass


@pytest.mark.parametrize("lost", ["stop", "cpu"])
def test_an_npu_that_is_lost_stops_the_engine_or_leaves_it_to_the_cpu_aloud(model, dense, lost):
    import os
    import signal

    shared = HybridOptions(hot=0.6, cluster=32, lost=lost)
    with Engine.open(model, backend=QNN, cold="numpy", predictor="exact", hybrid=shared) as engine:
        session = engine.session()
        session.logits(PROMPT[:1])
        os.kill(engine.hybrid._accelerator._client.process_id, signal.SIGKILL)
        if lost == "stop":
            with pytest.raises(PluginError, match="SIGKILL"):
                session.logits(PROMPT[1:2])
            assert tokens(engine) == dense[1]  # a new worker has taken over
        else:
            session.logits(PROMPT[1:2])
            assert any("SIGKILL" in note and "the CPU computes everything" in note for note in engine.notes)


def test_figures_of_speed_are_left_out(model):
    with Engine.open(model, backend=QNN, predictor="exact") as engine:
        generation = engine.generate(PROMPT, Sampling(max_tokens=2))
        for _ in generation:
            pass
        said = generation.stats.to_json(engine.setup())
    assert generation.stats.decode_tps > 0
    speed = ("ttft_s", "prefill_tps", "decode_tps", "token_latency_s")
    assert [said[name] for name in speed] == [None] * 4


@pytest.fixture(scope="module")
def default():
    """Tokens, and the dense logits of the default model."""
    with Engine.open("smollm2-relu", backend="numpy", predictor="exact", context=64) as engine:
        ids = engine.encode("The capital of France is Paris, and that of Italy is")[:12]
        return ids, engine.logits(ids)


def default_engine(**shared):
    qnn, hybrid = "qnn:emulator=on,cluster=384", HybridOptions(**shared)
    return Engine.open(
        "smollm2-relu", backend=qnn, cold="numpy", predictor="exact", context=64, hybrid=hybrid
    )


def all_near(parts, want):
    logits = np.concatenate(parts)
    far_off = np.linalg.norm(logits - want, axis=1) / np.linalg.norm(want, axis=1)
    assert (far_off < QnnBackend.tolerance).all()
    assert np.array_equal(logits.argmax(axis=1), want.argmax(axis=1))


def test_all_logits_of_the_default_model_are_the_dense_ones(default):
    """A prompt whose FFNs are all the emulator's, then single tokens at three shares of hot neurons."""
    (ids, want), shares = default, (0.25, 0.5, 0.75)
    with default_engine(hot=shares[0], most=1.0, prefill="accelerator") as engine:
        session, hybrid = engine.session(), engine.hybrid
        got, counts = [session.logits(ids[:-3])], []
        for token, share in zip(ids[-3:], shares, strict=True):
            hybrid.set_share(share)
            wait_for_graphs(hybrid)
            got.append(session.logits([token]))
            counts.append({hybrid.hot.count(ffn) for ffn in range(30)})
        assert counts == [{round(1536 * share)} for share in shares]
        assert engine.setup()["hybrid"]["graphs"]["used"] == 30 * 4
    all_near(got, want)


def test_they_are_if_attention_is_the_emulators(default):
    ids, want = default
    with default_engine(hot=0.0, attention="accelerator") as engine:
        session = engine.session()
        all_near([session.logits(ids[:-2]), *(session.logits([token]) for token in ids[-2:])], want)
        assert engine.setup()["hybrid"]["attention"] == "accelerator"


def wait_for_graphs(hybrid):
    """Those of a single token, for the share that was asked for."""
    count, power = hybrid.hot.neurons(hybrid.share), hybrid._accelerator
    end = time.monotonic() + 120
    while not all(power.prepare_ffn(handle, 1, count) for handle in hybrid._placed):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_pi2_eval_leaves_them_out_too(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The bark of willows.")
    command = (
        "eval",
        model,
        text,
        "--tokens",
        6,
        "--sequence",
        6,
        "--backend",
        QNN,
        "--cold",
        "numpy",
        "--hot",
        0.6,
    )
    said = pi2(*command, "--json")
    assert said.exit_code == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["tokens_per_s"] is found["predictor_s"] is None
    assert found["perplexity"] > 1
    told = pi2(*command)
    assert told.exit_code == 0
    assert "tokens/s" not in told.stdout + told.stderr
