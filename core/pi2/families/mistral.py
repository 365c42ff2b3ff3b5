"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, llama_like


@from_keys(hidden_act="silu", rms_norm_eps=1e-6, num_key_value_heads=8, sliding_window=4096)
def configure(keys: Keys) -> Architecture:
    return llama_like(keys, "mistral", window=whole_window(keys))


def whole_window(keys: Keys) -> int | None:
    """``sliding_window``, where null means that there is none."""
    return None if keys.value("sliding_window") is None else keys.integer("sliding_window")


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    configure=configure,
    names=NAMES,
)
