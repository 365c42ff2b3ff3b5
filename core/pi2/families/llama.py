"""Llama 1 to 3, SmolLM, and every model that says it is a Llama; with biases, with any activation."""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, attention_bias, llama_like


@from_keys(hidden_act="silu", rms_norm_eps=1e-6)
def configure(keys: Keys) -> Architecture:
    return llama_like(keys, "llama", ffn_bias=keys.flag("mlp_bias"), **attention_bias(keys))


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf=("llama",),
    gguf_permuted=True,
    configure=configure,
    names=NAMES,
)
