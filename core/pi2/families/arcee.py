"""Arcee AFM: Llama whose FFN has no gate, with squared ReLU."""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, attention_bias, llama_like


@from_keys(hidden_act="relu2", rms_norm_eps=1e-5)
def configure(keys: Keys) -> Architecture:
    return llama_like(keys, "arcee", gated=False, ffn_bias=keys.flag("mlp_bias"), **attention_bias(keys))


FAMILY = Family(
    name="arcee",
    architectures=("ArceeForCausalLM",),
    gguf=("arcee",),
    gguf_permuted=True,
    configure=configure,
    names=NAMES,
)
