"""The toy models of pi2.testing: small, repeatable, sparse, and whole."""

import numpy as np
import pytest
from pi2.container.manifest import describe_member
from pi2.engine import Engine
from pi2.sampling import Sampling
from pi2.testing.models import (
    SPECIALS,
    RandomSource,
    ffn_inputs,
    toy_architecture,
    toy_tokenizer,
    write_toy_model,
)

SPARSE = {
    "relu": {},
    "drelu": {"up_relu": True},
    "relu2 without gate": {"activation": "relu2", "gated": False, "ffn_bias": True},
    "layer norm": {"norm": "layer", "norm_bias": True},
}


def test_the_same_seed_gives_the_same_model_and_another_one_does_not(tmp_path):
    paths = [write_toy_model(tmp_path / f"{i}", seed=seed) for i, seed in enumerate((1, 1, 2))]
    for name in ("dense.safetensors", "neurons.safetensors"):
        one, same, other = (describe_member(path, name).sha256 for path in paths)
        assert one == same
        assert one != other


@pytest.mark.parametrize("quant", ["f32", "f16", "q8_0", "q4_0"])
def test_a_toy_model_has_less_than_a_megabyte(tmp_path, quant):
    path = write_toy_model(tmp_path / "model", quant=quant)
    assert sum(file.stat().st_size for file in path.iterdir()) < 1 << 20


@pytest.mark.parametrize("changes", SPARSE.values(), ids=SPARSE.keys())
def test_a_tenth_to_a_third_of_the_neurons_is_active(tmp_path, changes):
    path = write_toy_model(tmp_path / "model", toy_architecture(**changes), quant="q4_0")
    with Engine.open(path) as engine:
        engine.logits(engine.encode("Sparse models compute only what is active."))
        count = engine.decoder.ffn_count
        assert 0.1 <= count.active / count.total <= 0.33


def test_a_toy_model_generates(tmp_path):
    with Engine.open(write_toy_model(tmp_path / "model")) as engine:
        prompt = engine.chat_prompt([{"role": "user", "content": "Hi"}])
        generation = engine.generate(prompt, Sampling(max_tokens=8))
        for _ in generation:
            pass
        assert 0 < len(generation.stats.tokens) <= 8


def test_the_tokenizer_has_a_token_for_every_byte():
    tokenizer = toy_tokenizer()
    assert tokenizer.get_vocab_size() == toy_architecture().vocab_size == 256 + len(SPECIALS)
    text = "Grüße, 世界 🙂\0\n"
    ids = tokenizer.encode(text).ids
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids) == text
    assert ids[0] == toy_architecture().bos_id
    assert [tokenizer.token_to_id("</s>")] == list(toy_architecture().eos_ids)


def test_typical_inputs_are_what_the_ffns_of_the_model_see():
    arch = toy_architecture()
    x = ffn_inputs(arch, 500, np.random.default_rng(0))
    gate = RandomSource(arch).tensor("layers.0.ffn.gate.weight").to_f32()
    assert 0.1 <= np.mean(x @ gate.T > 0) <= 0.33
    assert np.allclose(np.mean(np.square(x), axis=1), 1, atol=1e-5)
