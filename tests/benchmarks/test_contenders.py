"""The contenders of the benchmarks do the work that they are timed for."""

import dataclasses
import json

import numpy as np
import pytest
from contenders import Contender, Pi2, _Given
from in_memory import dense_twin, token_bytes
from make_model import make
from pi2.container import read_manifest
from pi2.engine import Engine
from sparse_source import Shape

TINY = Shape(
    d_model=128, neurons=256, layers=2, heads=4, kv_heads=2, head_dim=32, vocab=512, context=128, rank=16
)
IDS = np.random.default_rng(0).integers(0, TINY.vocab, 20).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"), TINY)


def decoded(engine):
    session = engine.session()
    session.forward(IDS[:12])
    return [session.forward([token]) for token in IDS[12:]]


def test_given_active_sets_change_no_bit(tiny):
    contender = Pi2(tiny, backend="numpy")
    engine = contender._engine
    exact = decoded(engine)
    sets = contender._active_sets(IDS, 12)
    assert len(sets) == 8 * TINY.layers
    engine.decoder.predictor = _Given(sets)
    assert all(np.array_equal(a, b) for a, b in zip(exact, decoded(engine), strict=True))
    assert 0 < np.mean([len(s) for s in sets]) < TINY.neurons / 4


def test_the_dense_twin_has_the_same_weights_and_every_neuron_counts(tiny):
    twin = dense_twin(tiny)
    assert dense_twin(tiny) == twin
    ours, theirs = read_manifest(tiny), read_manifest(twin)
    assert ours.files["neurons.safetensors"] == theirs.files["neurons.safetensors"]
    with Engine.open(twin, backend="numpy", verify=True) as engine:
        assert engine.model.architecture == dataclasses.replace(TINY, activation="silu").architecture()
        decoded(engine)
        assert engine.decoder.ffn_count.active == engine.decoder.ffn_count.total


@pytest.mark.parametrize("kind", ["pi2", "llama.cpp", "ik_llama.cpp"])
def test_every_contender_answers_from_a_process_of_its_own(tiny, kind):
    pytest.importorskip({"pi2": "pi2", "llama.cpp": "xllamacpp", "ik_llama.cpp": "ik_llama_cpp"}[kind])
    ours = {"backend": "numpy", "context": 64}
    theirs = {"threads": 1, "context": 64}
    model = tiny if kind == "pi2" else tiny.parent / "model.gguf"
    with Contender(kind, model, **(ours if kind == "pi2" else theirs)) as contender:
        answer = contender.run(IDS, 12)
    assert answer["prefill_s"] > 0
    assert len(answer["token_s"]) == 8
    assert min(answer["token_s"]) > 0


def test_a_contender_that_dies_is_noticed(tmp_path):
    with pytest.raises(RuntimeError, match="pi2 ended with status"):
        Contender("pi2", tmp_path / "nothing")


def test_bytes_of_a_token_are_those_of_the_weights(tiny):
    every = token_bytes(tiny, "dense", 1.0, 0)
    manifest = read_manifest(tiny)
    weights = sum(manifest.files[name].nbytes for name in ("dense.safetensors", "neurons.safetensors"))
    stride, size = manifest.geometry.stride, manifest.geometry.nbytes
    padding = TINY.layers * TINY.neurons * (stride - size)
    embedding = TINY.vocab * 72
    assert 0 < weights - padding - embedding - every < 20_000  # norms and headers
    assert token_bytes(tiny, "given", 0.1, 0) < token_bytes(tiny, "exact", 0.1, 0) < every
    assert token_bytes(tiny, "exact", 1.0, 0) == every
    assert json.loads(manifest.source["shape"])["density"] == 0.1
