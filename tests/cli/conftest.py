"""Models for the tests of the command line."""

import json

import numpy as np
import pytest
from pi2.testing.models import toy_architecture, toy_tokenizer, write_toy_model
from safetensors.numpy import save_file


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(write_toy_model(tmp_path_factory.mktemp("models") / "toy.pi2"))


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose answers last far longer than any test."""
    arch = toy_architecture(max_context=1 << 20)
    return str(write_toy_model(tmp_path_factory.mktemp("models") / "endless.pi2", arch))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A Hugging Face directory with random weights."""
    path = tmp_path_factory.mktemp("models") / "tiny llama"
    path.mkdir()
    d, neurons, vocab = 32, 64, toy_tokenizer().get_vocab_size()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "relu"}
    config |= {"vocab_size": vocab, "hidden_size": d, "intermediate_size": neurons, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "eos_token_id": 1}
    shapes = {"embed_tokens": (vocab, d), "norm": (d,)}
    shapes |= {f"layers.0.self_attn.{p}_proj": (d if p in "qo" else d // 2, d) for p in "qkvo"}
    shapes |= {f"layers.0.mlp.{p}_proj": (neurons, d) for p in ("gate", "up")}
    shapes |= {"layers.0.mlp.down_proj": (d, neurons)}
    shapes |= {f"layers.0.{n}": (d,) for n in ("input_layernorm", "post_attention_layernorm")}
    rng = np.random.default_rng(0)
    weights = {f"model.{n}.weight": rng.normal(0, 0.1, s).astype(np.float32) for n, s in shapes.items()}
    save_file(weights, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(toy_tokenizer().to_str())
    return path


@pytest.fixture(autouse=True)
def only_builtins(monkeypatch):
    monkeypatch.setenv("PI2_PLUGINS", "")
    monkeypatch.delenv("PI2_MODEL", raising=False)
