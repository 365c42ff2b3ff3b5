"""The default model on OpenCL: alone, and as the hot half beside another backend, under every profile."""

import json

import numpy as np
import pytest
from pi2.engine import Engine
from pi2.hybrid import HybridOptions
from pi2.offload_options import OffloadOptions
from pi2.plugins import Plugins
from pi2.sampling import Sampling
from pi2_backend_opencl.backend import OpenclBackend

PROFILES = ("", "profile=adreno730,", "profile=adreno830,", "profile=minimal,")
PROMPT, DECODED = [1, 504, 3575, 282, 4649, 314, 253], [3575, 282]
PLUGINS = Plugins.installed()
EXACT = "cpu:activations=f32" if "cpu" in PLUGINS.of("backends") else "numpy"

pytestmark = [
    pytest.mark.skipif(not OpenclBackend.probe(), reason=OpenclBackend.probe().reason),
    pytest.mark.skipif(
        "smollm2-relu" not in PLUGINS.models, reason="pi2-model-smollm2-relu is not installed"
    ),
]


def opened(backend, **options):
    return Engine.open("smollm2-relu", backend=backend, plugins=PLUGINS, **options)


def results(engine):
    """Logits of a prompt and of tokens behind it, and what comes next."""
    session = engine.session()
    logits = [session.logits(PROMPT), *(session.forward([token])[None] for token in DECODED)]
    generation = engine.generate(PROMPT, Sampling(max_tokens=8))
    return np.concatenate(logits), [piece.token for piece in generation]


@pytest.fixture(scope="module")
def expected():
    with opened(EXACT) as engine:
        return results(engine)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("kernels"))


def check(engine, expected):
    logits, tokens = results(engine)
    np.testing.assert_allclose(logits, expected[0], atol=1e-3)
    assert tokens == expected[1]


@pytest.mark.parametrize("profile", PROFILES)
def test_alone(expected, cache, profile):
    with opened(f"opencl:{profile}cache={cache}") as engine:
        check(engine, expected)


@pytest.mark.parametrize(
    ("profile", "hot", "where"),
    [*((profile, 0.5, "accelerator") for profile in PROFILES), ("", 0.9, "cpu"), (PROFILES[1], 0.1, "cpu")],
)
def test_as_the_hot_half(expected, cache, profile, hot, where):
    options = HybridOptions(hot, attention=where, prefill=where)
    with opened(f"opencl:{profile}cache={cache}", cold=EXACT, hybrid=options) as engine:
        check(engine, expected)
        in_place = all(ffn.kept is not None for ffn in engine.hybrid._placed)
        assert in_place == engine._parts["backend"]._device.caps.unified_memory  # the mapped file
        said = engine.setup()["hybrid"]
        assert said["decode_s"]["hot"] > 0 < said["decode_s"]["cold"]
        assert (said["hot_neurons"], said["neurons"]) == (round(hot * 24) * 64, 1536)


def test_as_the_hot_half_of_a_model_on_flash(expected, cache):
    offload = OffloadOptions(slots=2 * 1536)
    with opened(f"opencl:cache={cache}", cold=EXACT, hybrid=HybridOptions(), offload=offload) as engine:
        check(engine, expected)
        assert engine.setup()["hybrid"]["hot_neurons"] == 768


def test_a_share_that_changes_between_tokens_changes_nothing_else(expected, cache):
    with opened(f"opencl:cache={cache}", cold=EXACT, hybrid=HybridOptions(0.1, most=1.0)) as engine:
        session = engine.session()
        logits = [session.logits(PROMPT)]
        for share, token in zip((0.9, 0.0), DECODED, strict=True):
            engine.hybrid.set_share(share)
            logits.append(session.forward([token])[None])
            assert engine.hybrid.hot.count(29) == round(share * 24) * 64
        np.testing.assert_allclose(np.concatenate(logits), expected[0], atol=1e-3)


def test_a_trace_shows_that_both_halves_compute_at_the_same_time(cache, tmp_path):
    trace = tmp_path / "trace.json"
    options = HybridOptions(trace=trace)
    with opened(f"opencl:cache={cache}", cold=EXACT, hybrid=options) as engine:
        results(engine)
        assert engine.setup()["hybrid"]["decode_s"]["both"] > 0
    events = [event for event in json.loads(trace.read_text()) if event["ph"] == "X"]
    hot, cold = ([e for e in events if e["name"] == name] for name in ("hot", "cold"))
    assert len(hot) == len(cold) > 200
    meet = [min(h["ts"] + h["dur"], c["ts"] + c["dur"]) > max(h["ts"], c["ts"])
            for h, c in zip(hot, cold, strict=True)]  # fmt: skip
    assert any(meet)
    assert {e["tid"] for e in hot} & {e["tid"] for e in cold} == set()
