"""Attention as one graph: what the conformance kit does not ask of static graphs."""

import os
import signal

import numpy as np
import pytest
from command_line import pi2
from pi2.attention import AttentionSpec
from pi2.engine import Engine
from pi2.hybrid import HybridOptions
from pi2.tensor import Tensor, encode
from pi2.testing.attention import AttentionCase, call_attention
from pi2.testing.attention_reference import attention
from pi2.testing.models import toy_architecture, write_toy_model
from pi2_backend_qnn.attention import Attention, context_for
from pi2_backend_qnn.backend import Matrices, QnnBackend
from pi2_backend_qnn.probe import probe
from qnn_models import PROMPT, QNN

pytestmark = pytest.mark.skipif(not probe(), reason=probe().reason)


@pytest.fixture(scope="module")
def backend():
    opened = QnnBackend.open({"emulator": "on"})
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def dense(model):
    with Engine.open(model, backend="numpy", predictor="exact") as engine:
        return engine.logits(PROMPT)


def block(rng, heads=4, kv_heads=2, d=32, head_dim=16, dtype="q8_0"):
    def matrix(rows, cols):
        values = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(cols**-0.5)
        return Tensor(encode(values, dtype), dtype, cols)

    wide, narrow = heads * head_dim, kv_heads * head_dim
    parts = {"q": matrix(wide, d), "k": matrix(narrow, d), "v": matrix(narrow, d), "o": matrix(d, wide)}
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=0.25, **parts)


def case(rng, tokens, start=0, size=1.0):
    spec = block(rng)
    past = rng.standard_normal((2, spec.kv_heads, start, spec.head_dim)).astype(np.float32)
    return AttentionCase(spec, rng.standard_normal((tokens, 32)).astype(np.float32) * np.float32(size), *past)


def is_right(backend, tried):
    handle = backend.place_attention(tried.spec)
    assert isinstance(handle, Attention)
    got = call_attention(backend, handle, tried)
    want = attention(tried.spec, tried.x, tried.keys, tried.values, QnnBackend.tolerance)
    for name, each in zip(("output", "keys", "values"), got, strict=True):
        assert getattr(want, name).accepts(each), name
    shapes = set(handle.graphs)
    backend.release(handle)
    return shapes


@pytest.mark.parametrize(
    ("tokens", "start", "shapes"),
    [(1, 0, {(1, 0)}), (1, 33, {(1, 128)}), (20, 31, {(32, 32)}), (130, 0, {(128, 0), (4, 128)})],
)
def test_graphs_are_of_few_sizes(backend, tokens, start, shapes):
    assert is_right(backend, case(np.random.default_rng(tokens), tokens, start)) == shapes
    assert {context for _, context in shapes} <= {context_for(n) for n in range(200)}


@pytest.mark.parametrize("size", [1e6, 1e15])
def test_what_fp16_cannot_hold_is_computed_here(backend, size):
    assert is_right(backend, case(np.random.default_rng(0), 3, 5, size)) == set()


def test_a_token_that_is_not_finite_gives_nothing_that_is(backend):
    tried = case(np.random.default_rng(0), 4)
    tried.x[3, 0] = np.nan
    out, keys, _ = call_attention(backend, backend.place_attention(tried.spec), tried)
    assert np.isnan(out[3]).all()
    assert np.isnan(keys[:, 3]).all()
    assert np.isfinite(keys[:, :3]).all()


@pytest.mark.parametrize("lost", [False, True])
def test_attention_on_the_npu_beside_hot_clusters_and_what_happens_without_it(model, dense, lost):
    shared = HybridOptions(hot=0.6, cluster=32, attention="accelerator", lost="cpu")
    with Engine.open(model, backend=QNN, cold="numpy", predictor="exact", hybrid=shared) as engine:
        session = engine.session()
        logits = [session.logits(PROMPT[:10])]
        if lost:
            os.kill(engine.hybrid._accelerator._client.process_id, signal.SIGKILL)
        logits += [session.logits([token]) for token in PROMPT[10:]]
        far = np.linalg.norm(np.concatenate(logits) - dense) / np.linalg.norm(dense)
        assert far < QnnBackend.tolerance
        assert engine.setup()["hybrid"]["attention"] == ("cpu" if lost else "accelerator")
        assert any("SIGKILL" in note for note in engine.notes) == lost


def test_with_contexts_its_matrices_are_theirs(tmp_path):
    """Contexts have no graph of a whole block, which would be one for each length of the text."""
    model = write_toy_model(tmp_path / "model", toy_architecture(n_layers=1), quant="q4_0")
    folder, hybrid = tmp_path / "contexts", ("--hot", 0.6, "--hybrid", "cluster=32,attention=accelerator")
    done = pi2("compile", model, "--backend", "qnn:cluster=32", "--soc", "SM8650", "--out", folder, *hybrid)
    assert done.exit_code == 0, done.stderr
    with Engine.open(model, backend="numpy", predictor="exact") as engine:
        dense = engine.logits(PROMPT)
    shared = HybridOptions(hot=0.6, cluster=32, attention="accelerator")
    qnn = f"{QNN},contexts={folder}"
    with Engine.open(model, backend=qnn, cold="numpy", predictor="exact", hybrid=shared) as engine:
        assert all(isinstance(each, Matrices) for each in engine.decoder._attentions)
        far = np.linalg.norm(engine.logits(PROMPT) - dense) / np.linalg.norm(dense)
        assert far < QnnBackend.tolerance
