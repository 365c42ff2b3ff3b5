"""Attention blocks and whole models: any threads, any pieces, and the same as the reference."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pi2.architecture import Rope
from pi2.builtin.exact_predictor import ExactPredictor
from pi2.builtin.mmap_tier import MmapTier
from pi2.builtin.numpy_backend import NumpyBackend
from pi2.container.reader import open_model
from pi2.decoder import Decoder
from pi2.kv_cache import KvCache
from pi2.testing.attention import attention_cases, call_attention
from pi2.testing.models import toy_architecture, write_toy_model
from pi2_backend_cpu import native
from pi2_backend_cpu.backend import CpuBackend

LAYER_NORM = {"norm": "layer", "norm_bias": True}
MODELS = {
    "llama": {},
    "window": {"window": 5},
    "alternating": {"window": 70, "window_layers": (True, False), "qk_norm": True, "norm_place": "sandwich"},
    "softcap": {"attn_softcap": 2.0, "activation": "gelu_tanh"},
    "biases": {"qkv_bias": True, "o_bias": True, "ffn_bias": True, **LAYER_NORM},
    "post-norm": {"norm_place": "post", "rope": None, **LAYER_NORM},
    "one-kv-head": {"head_dim": 24, "n_kv_heads": 1, "rope": Rope(theta=1e4, dims=6), "tied": False},
}


@settings(deadline=None, max_examples=20)
@given(case=attention_cases(), dtype=st.sampled_from((np.float32, np.float16)))
def test_the_bits_of_attention_do_not_depend_on_the_threads(case, dtype):
    results = set()
    for threads in (1, 2, 3, 8):
        backend = CpuBackend(threads=threads)
        results.add(
            tuple(
                a.tobytes()
                for a in call_attention(backend, backend.place_attention(case.spec), case, (), dtype)
            )
        )
        backend.close()
    assert len(results) == 1


@pytest.mark.parametrize("activations", ["int8", "f32"])
@pytest.mark.parametrize("isa", native.instruction_sets(native.library()))
def test_cutting_a_prompt_into_pieces_of_several_tokens_changes_no_bit_of_attention(isa, activations):
    backend = CpuBackend(threads=2, isa=isa, activations=activations)

    @settings(deadline=None, max_examples=20)
    @given(case=attention_cases(tokens=(33,)))
    def check(case):
        block, dtype = backend.place_attention(case.spec), backend.kv_dtype
        whole, *cached = call_attention(backend, block, case, (), dtype)
        for pieces in ((2, 5, 20), (16,), tuple(range(2, 32, 2))):
            again, *cached_again = call_attention(backend, block, case, pieces, dtype)
            assert again.tobytes() == whole.tobytes()
            assert [a.tobytes() for a in cached_again] == [a.tobytes() for a in cached]

    check()
    backend.close()


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_what_it_says_in_numpy(tmp_path, name, quant):
    path = write_toy_model(tmp_path / "toy", toy_architecture(**MODELS[name]), quant=quant)
    tier = MmapTier.open()
    model = open_model(path, tier)
    ids = np.random.default_rng(3).integers(0, 250, 120)
    answers = []
    for backend in (NumpyBackend(), CpuBackend(threads=2, activations="f32")):
        decoder, cache = Decoder(model, backend, ExactPredictor.open()), KvCache(model.architecture)
        pieces = [decoder.forward(piece, cache, all_logits=True) for piece in np.split(ids, (1, 90, 91))]
        greedy = [int(pieces[-1][-1].argmax())]
        while len(greedy) < 20:
            greedy.append(int(decoder.forward(np.array(greedy[-1:]), cache).argmax()))
        answers.append((np.concatenate(pieces), greedy))
        backend.close()
    (expected, tokens), (logits, same_tokens) = answers
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert same_tokens == tokens
    tier.close()


def test_the_cache_is_in_halves_where_activations_are_rounded_anyway():
    assert CpuBackend(threads=1).kv_dtype is np.float16
    assert CpuBackend(threads=1, activations="f32").kv_dtype is np.float32


@settings(deadline=None, max_examples=20)
@given(case=attention_cases(tokens=(40,)), at=st.integers(0, 39))
def test_a_token_that_is_no_number_changes_none_before_it(case, at):
    """Masked by their weights alone, later values would reach them: 0 * NaN is NaN."""
    backend = CpuBackend(threads=2)
    block = backend.place_attention(case.spec)
    right, *_ = call_attention(backend, block, case)
    x = case.x.copy()
    x[at, 0] = np.nan
    out, *_ = call_attention(backend, block, dataclasses.replace(case, x=x))
    assert out[:at].tobytes() == right[:at].tobytes()
    assert np.isnan(out[at]).any()
    backend.close()
