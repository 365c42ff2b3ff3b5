"""What most families share with Llama: the keys of the configuration and the names of the tensors."""

from __future__ import annotations

from typing import Any

from pi2.architecture import Architecture
from pi2.errors import FormatError, UnsupportedModel
from pi2.families._keys import Keys
from pi2.families._rope import rope

_ATTENTION = "layers.{N}.attn"
_FFN = "layers.{N}.ffn"

NAMES: dict[str, str] = {
    "embed.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "final_norm.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
    f"{_ATTENTION}.norm.weight": "model.layers.{N}.input_layernorm.weight",
    f"{_ATTENTION}.norm.bias": "model.layers.{N}.input_layernorm.bias",
    f"{_FFN}.norm.weight": "model.layers.{N}.post_attention_layernorm.weight",
    f"{_FFN}.norm.bias": "model.layers.{N}.post_attention_layernorm.bias",
    **{f"{_ATTENTION}.{m}_norm.weight": f"model.layers.{{N}}.self_attn.{m}_norm.weight" for m in "qk"},
    **{
        f"{_ATTENTION}.{m}.{part}": f"model.layers.{{N}}.self_attn.{m}_proj.{part}"
        for m in "qkvo"
        for part in ("weight", "bias")
    },
    **{
        f"{_FFN}.{m}.{part}": f"model.layers.{{N}}.mlp.{m}_proj.{part}"
        for m in ("gate", "up", "down")
        for part in ("weight", "bias")
    },
}


def llama_like(keys: Keys, family: str, *, partial_rotary: float = 1.0, **differences: Any) -> Architecture:
    """An architecture from the keys that Llama and its kin have in common.

    ``differences`` are fields of Architecture in which the family is not like Llama.
    """
    d, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    context = keys.integer("max_position_embeddings")
    head_dim = head_width(keys, d, heads)
    fields = {
        "vocab_size": keys.integer("vocab_size"),
        "d_model": d,
        "n_layers": keys.layers(),
        "n_heads": heads,
        "n_kv_heads": keys.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "n_neurons": keys.integer("intermediate_size"),
        "max_context": context,
        "attn_scale": head_dim**-0.5,
        "tied": keys.flag("tie_word_embeddings"),
    }
    if "norm_eps" not in differences:
        fields["norm_eps"] = keys.number("rms_norm_eps")
    if "activation" not in differences:
        fields["activation"] = keys.activation("hidden_act")
    if "rope" not in differences:
        fields["rope"] = rope(keys, head_dim, context, partial=partial_rotary)
        _refuse_partial(fields["rope"].dims, head_dim, partial_rotary)
    if "window" not in differences:
        _refuse_windows(keys)
    return Architecture(family=family, **{**fields, **differences})


def head_width(keys: Keys, d_model: int, heads: int) -> int:
    """``head_dim``, or its default: an equal share of the model's width."""
    if keys.value("head_dim") is None and (heads == 0 or d_model % heads):
        raise FormatError(f"config.json: {heads} heads cannot share {d_model} dimensions")
    width = keys.integer("head_dim", d_model // max(1, heads))
    if width == 0:
        raise FormatError("config.json: heads of no dimensions cannot be")
    return width


def attention_bias(keys: Keys) -> dict[str, bool]:
    """One key for the biases of q, k, v and of the output, as in Llama."""
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "o_bias": bias}


def windows(keys: Keys) -> dict[str, Any]:
    """Qwen's sliding window: off unless asked for, then on the layers from ``max_window_layers`` on."""
    layers = keys.layers()
    size, first = keys.value("sliding_window"), keys.integer("max_window_layers", layers)
    kinds = keys.layer_types()
    if not keys.flag("use_sliding_window") or size is None:
        if "sliding_attention" in kinds:
            raise FormatError("config.json: layer_types asks for a sliding window that is switched off")
        return {"window": None}
    sliding = [kind == "sliding_attention" for kind in kinds] or [i >= first for i in range(layers)]
    if not any(sliding):
        return {"window": None}
    return {"window": keys.integer("sliding_window"), "window_layers": tuple(sliding)}


def _refuse_windows(keys: Keys) -> None:
    if "sliding_attention" in keys.layer_types():
        raise UnsupportedModel("this family has no layers with a sliding window, but layer_types names some")


def _refuse_partial(dims: int, head_dim: int, partial: float) -> None:
    """Only families that have a partial RoPE read its share; in the others transformers ignores it."""
    if partial == 1.0 and dims != head_dim:
        raise UnsupportedModel("this family rotates whole heads, but config.json asks for a part of them")
