"""Nemotron and Minitron: squared ReLU without a gate, layer norms that store w - 1, RoPE on half a head."""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, attention_bias, llama_like


@from_keys(hidden_act="relu2", norm_eps=1e-5)
def configure(keys: Keys) -> Architecture:
    return llama_like(
        keys,
        "nemotron",
        partial_rotary=0.5,
        norm="layer",
        norm_bias=True,
        norm_eps=keys.number("norm_eps"),
        gated=False,
        ffn_bias=keys.flag("mlp_bias"),
        **attention_bias(keys),
    )


FAMILY = Family(
    name="nemotron",
    architectures=("NemotronForCausalLM",),
    gguf=("nemotron",),
    configure=configure,
    names=NAMES,
    norm_offset=1.0,
)
