"""Qwen 3: Llama with RMS-normalised query and key heads and a head width of its own."""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, attention_bias, llama_like, windows


@from_keys(
    hidden_act="silu",
    rms_norm_eps=1e-6,
    num_key_value_heads=32,
    head_dim=128,
    sliding_window=4096,
    max_window_layers=28,
)
def configure(keys: Keys) -> Architecture:
    return llama_like(keys, "qwen3", qk_norm=True, **attention_bias(keys), **windows(keys))


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf=("qwen3",),
    configure=configure,
    names=NAMES,
)
