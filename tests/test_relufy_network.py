"""The forward pass in PyTorch is the decoder's, for every family; rounding is the container's."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.architecture import Rope
from pi2.config import Settings
from pi2.engine import Engine
from pi2.plugins import Plugins
from pi2.relufy.corpus import Document, pack
from pi2.relufy.network import Network
from pi2.relufy.rounding import rounded
from pi2.relufy.sources import PiModelSource
from pi2.relufy.twin import load_weights
from pi2.tensor import DTYPES, Tensor
from pi2.testing.models import toy_architecture, write_toy_model

LOCAL = Rope(theta=500.0, dims=16)
FAMILIES = {
    "llama": {"activation": "silu"},
    "llama 3": {
        "activation": "silu",
        "rope": Rope(theta=1e4, dims=16, kind="llama3", factor=8.0, original_context=64),
    },
    "yarn": {
        "activation": "silu",
        "rope": Rope(theta=1e4, dims=8, kind="yarn", factor=4.0, original_context=64, attn_factor=1.1),
    },
    "mistral": {"activation": "silu", "window": 7, "tied": False},
    "qwen2": {"activation": "silu", "qkv_bias": True},
    "qwen3": {"activation": "silu", "qk_norm": True, "tied": False},
    "gemma3": {
        "activation": "gelu_tanh",
        "norm_place": "sandwich",
        "qk_norm": True,
        "embed_scale": 8.0,
        "local_rope": LOCAL,
        "window": 5,
        "window_layers": (True, False),
        "attn_softcap": 20.0,
        "logit_softcap": 5.0,
    },
    "opt with gelu": {
        "activation": "gelu",
        "gated": False,
        "ffn_bias": True,
        "qkv_bias": True,
        "o_bias": True,
        "norm": "layer",
        "norm_bias": True,
        "rope": None,
    },
    "opt 350m": {"gated": False, "norm": "layer", "norm_bias": True, "norm_place": "post", "rope": None},
    "biased and gated": {"activation": "silu", "ffn_bias": True, "o_bias": True, "logit_scale": 0.5},
    "nemotron": {
        "activation": "relu2",
        "gated": False,
        "norm": "layer",
        "norm_bias": True,
        "final_norm": False,
    },
    "drelu": {"up_relu": True},
}


def document(ids):
    return Document(np.array(ids, np.int64), np.zeros(len(ids), np.int8))


@pytest.fixture(params=FAMILIES)
def engine(request, tmp_path):
    arch = toy_architecture(**FAMILIES[request.param])
    path = write_toy_model(tmp_path / "model", arch, quant="f32")
    with Engine.open(path, plugins=Plugins.installed(Settings(plugins=frozenset()))) as engine:
        yield engine


def test_logits_are_the_decoders_also_for_documents_packed_into_a_row(engine):
    network = Network(engine.model.architecture, load_weights(PiModelSource(engine.model)))
    texts = [list(b"Rain falls from clouds when drops grow heavy."), [256, *b"Hi"], [7]]
    trace = network.trace(pack([document(ids) for ids in texts]))
    found = network.logits(trace.streams[-1]).numpy()
    wanted = np.concatenate([engine.logits(ids) for ids in texts])
    assert np.abs(found - wanted).max() < 1e-4


def test_the_gates_are_what_the_activation_is_given(engine):
    arch = engine.model.architecture
    if not arch.sparse or arch.up_relu:
        return
    network = Network(arch, load_weights(PiModelSource(engine.model)))
    ids = list(b"Sparse models compute what is active")
    trace = network.trace(pack([document(ids)]))
    engine.logits(ids)
    active = sum(int((gate > 0).sum()) for gate in trace.gates)
    assert abs(active - engine.decoder.ffn_count.active) <= 2  # gates within rounding of zero


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**32 - 1), st.sampled_from((1e-42, 1e-6, 1.0, 1e3))
)
def test_rounding_is_what_storing_does_to_weights(dtype, rows, blocks, seed, size):
    rng = np.random.default_rng(seed)
    values = (rng.normal(0, size, (rows, 32 * blocks))).astype(np.float32)
    values[rng.random(values.shape) < 0.2] = 0
    grid = rng.random(rows) < 0.5  # as dequantised weights: many of the same magnitude
    values[grid] = np.round(values[grid] / size * 4).astype(np.float32) * np.float32(size)
    stored = Tensor.from_f32(values, dtype).to_f32()
    assert np.array_equal(rounded(torch.from_numpy(values), dtype).numpy(), stored)


def test_a_pi2_model_reads_as_the_source_of_another(tmp_path):
    arch = toy_architecture(activation="silu", ffn_bias=True, o_bias=True)
    from pi2.builtin.mmap_tier import MmapTier
    from pi2.container import open_model
    from pi2.container.layout import QuantPlan
    from pi2.convert import convert

    path = write_toy_model(tmp_path / "a", arch, quant="q4_0")
    source = PiModelSource(open_model(path, MmapTier()))
    again = open_model(convert(source, tmp_path / "b", QuantPlan.named("f32")), MmapTier())
    for layer in range(arch.n_layers):
        one, other = (m.geometry.unpack(m.bundles(layer)) for m in (source._model, again))
        for field in dataclasses.fields(one):
            assert np.array_equal(getattr(one, field.name), getattr(other, field.name))
    assert np.array_equal(source.tensor("embed.weight").to_f32(), again.matrix("embed.weight").to_f32())
