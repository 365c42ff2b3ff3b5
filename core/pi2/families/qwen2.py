"""Qwen 1.5, 2 and 2.5: Llama with biases on q, k and v, and windows on the last layers if asked for."""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, llama_like, windows


@from_keys(
    hidden_act="silu", rms_norm_eps=1e-6, num_key_value_heads=32, sliding_window=4096, max_window_layers=28
)
def configure(keys: Keys) -> Architecture:
    return llama_like(keys, "qwen2", qkv_bias=True, **windows(keys))


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf=("qwen2",),
    configure=configure,
    names=NAMES,
)
