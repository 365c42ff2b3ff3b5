"""Gemma 3, text only: norms before and after, 1 + w, GeGLU; local layers have a RoPE and a window."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pi2.architecture import Architecture, Rope
from pi2.errors import FormatError, UnsupportedModel
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import NAMES, attention_bias, llama_like
from pi2.families._rope import parse


@from_keys(
    hidden_activation="gelu_pytorch_tanh",
    rms_norm_eps=1e-6,
    num_key_value_heads=4,
    head_dim=256,
    max_position_embeddings=131_072,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    tie_word_embeddings=True,
)
def configure(keys: Keys) -> Architecture:
    if keys.flag("use_bidirectional_attention"):
        raise UnsupportedModel("attention in both directions is not supported")
    everywhere, local = _ropes(keys)
    scalar = keys.positive_or_none("query_pre_attn_scalar")
    if scalar is None:
        raise FormatError("config.json: query_pre_attn_scalar is null")
    return llama_like(
        keys,
        "gemma3",
        norm_place="sandwich",
        qk_norm=True,
        activation=keys.activation("hidden_activation"),
        rope=everywhere,
        local_rope=local,
        attn_scale=scalar**-0.5,
        # as documented; transformers 5.23 reads the key and forgets it, every released model has null
        attn_softcap=keys.positive_or_none("attn_logit_softcapping"),
        logit_softcap=keys.positive_or_none("final_logit_softcapping"),
        embed_scale=_embed_scale(keys),
        **attention_bias(keys),
        **_window(keys),
    )


def _window(keys: Keys) -> dict[str, Any]:
    """Local layers by name, or all but every ``sliding_window_pattern``-th."""
    layers = keys.layers()
    period = keys.integer("sliding_window_pattern", 6)
    kinds = keys.layer_types()
    if period == 0:
        raise FormatError("config.json: sliding_window_pattern = 0 cannot be")
    local = [kind == "sliding_attention" for kind in kinds] or [(i + 1) % period > 0 for i in range(layers)]
    if not any(local):
        keys.value("sliding_window")
        return {"window": None}
    return {"window": keys.integer("sliding_window"), "window_layers": tuple(local)}


def _ropes(keys: Keys) -> tuple[Rope, Rope]:
    """The RoPE of the global and of the local layers; scaling of the old style is for the global ones."""
    context, head_dim = keys.integer("max_position_embeddings"), keys.integer("head_dim")
    new = keys.section("rope_parameters")
    parts = []
    for kind, key, theta in (
        ("full_attention", "rope_theta", 1_000_000.0),
        ("sliding_attention", "rope_local_base_freq", 10_000.0),
    ):
        given = new.get(kind) or {}
        if not isinstance(given, dict) or set(new) - {"full_attention", "sliding_attention"}:
            raise FormatError("config.json: rope_parameters does not name the kinds of layers")
        given = {"rope_theta": keys.number(key, theta), **given}
        if kind == "full_attention":
            given |= keys.section("rope_scaling")
        parts.append(parse(keys, given, head_dim, context))
    return parts[0], parts[1]


def _embed_scale(keys: Keys) -> float:
    """sqrt(d_model), rounded to the type of the weights as in training (34 instead of 33.94 in bfloat16)."""
    scale = math.sqrt(keys.integer("hidden_size"))
    dtype = str(keys.value("dtype") or keys.value("torch_dtype")).removeprefix("torch.")
    if dtype == "bfloat16":
        bits = int(np.float32(scale).view(np.uint32))
        bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
        return float(np.uint32(bits & 0xFFFF0000).view(np.float32))
    return float(np.float16(scale)) if dtype == "float16" else scale


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    gguf=("gemma3",),
    configure=configure,
    names={
        **NAMES,
        "layers.{N}.attn.post_norm.weight": "model.layers.{N}.post_attention_layernorm.weight",
        "layers.{N}.ffn.norm.weight": "model.layers.{N}.pre_feedforward_layernorm.weight",
        "layers.{N}.ffn.post_norm.weight": "model.layers.{N}.post_feedforward_layernorm.weight",
    },
    norm_offset=1.0,
)
