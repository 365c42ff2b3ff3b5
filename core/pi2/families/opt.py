"""OPT: learned positions, layer norms and biases everywhere, ReLU without a gate (arXiv 2205.01068)."""

from __future__ import annotations

from pi2.architecture import Architecture
from pi2.errors import UnsupportedModel
from pi2.families._family import Family
from pi2.families._keys import Keys, from_keys
from pi2.families._llama_like import head_width

_LAYER = "model.decoder.layers.{N}"
_PLACES = {
    "attn.norm": "self_attn_layer_norm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "ffn.norm": "final_layer_norm",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
}


@from_keys(activation_function="relu", do_layer_norm_before=True, enable_bias=True, tie_word_embeddings=True)
def configure(keys: Keys) -> Architecture:
    d, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if keys.integer("word_embed_proj_dim", d) != d:
        raise UnsupportedModel(
            "embeddings of another width than the model (word_embed_proj_dim) are not supported",
            hint="opt-350m is the only OPT that has them; the other sizes work",
        )
    if not keys.flag("layer_norm_elementwise_affine", True):
        raise UnsupportedModel("layer norms without weights are not supported")
    before, bias = keys.flag("do_layer_norm_before"), keys.flag("enable_bias")
    head_dim = head_width(keys, d, heads)
    return Architecture(
        family="opt",
        vocab_size=keys.integer("vocab_size"),
        d_model=d,
        n_layers=keys.layers(),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=head_dim,
        n_neurons=keys.integer("ffn_dim"),
        max_context=keys.integer("max_position_embeddings"),
        norm="layer",
        norm_bias=True,
        norm_place="pre" if before else "post",
        final_norm=before and not keys.flag("_remove_final_layer_norm"),
        activation=keys.activation("activation_function"),
        gated=False,
        qkv_bias=bias,
        o_bias=bias,
        ffn_bias=bias,
        attn_scale=head_dim**-0.5,
        tied=keys.flag("tie_word_embeddings"),
    )


FAMILY = Family(
    name="opt",
    architectures=("OPTForCausalLM",),
    configure=configure,
    names={
        "embed.weight": "model.decoder.embed_tokens.weight",
        "embed.positions": "model.decoder.embed_positions.weight",
        "head.weight": "lm_head.weight",
        **{f"final_norm.{part}": f"model.decoder.final_layer_norm.{part}" for part in ("weight", "bias")},
        **{
            f"layers.{{N}}.{ours}.{part}": f"{_LAYER}.{theirs}.{part}"
            for ours, theirs in _PLACES.items()
            for part in ("weight", "bias")
        },
    },
    position_offset=2,  # fairseq numbers positions from its padding index + 1
)
