"""The canonical tensors of a model: which there are, under which names, in which shapes.

    embed.weight (vocab, d)    embed.positions (max_context, d), if positions are learned
    layers.N.attn.{q,k,v,o}.weight, layers.N.attn.norm.weight, ...
    layers.N.ffn.{gate,up}.weight (neurons, d), layers.N.ffn.down.weight (neurons, d): neuron-major
    final_norm.weight          head.weight (vocab, d), unless it is tied to the embedding

Matrices of the FFNs and their per-neuron biases go into bundles, everything else is dense.
"""

from __future__ import annotations

from pi2.architecture import Architecture


def dense_matrices(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Name -> (rows, cols) of every matrix outside the FFNs."""
    d, heads, kv = arch.d_model, arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    shapes = {"embed.weight": (arch.vocab_size, d)}
    if arch.rope is None:
        shapes["embed.positions"] = (arch.max_context, d)
    for i in range(arch.n_layers):
        at = f"layers.{i}.attn"
        shapes |= {
            f"{at}.q.weight": (heads, d),
            f"{at}.k.weight": (kv, d),
            f"{at}.v.weight": (kv, d),
            f"{at}.o.weight": (d, heads),
        }
    if not arch.tied:
        shapes["head.weight"] = (arch.vocab_size, d)
    return shapes


def dense_vectors(arch: Architecture) -> dict[str, int]:
    """Name -> length of every norm and bias outside the bundles."""
    d, heads, kv = arch.d_model, arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    lengths: dict[str, int] = {}

    def norm(name: str) -> None:
        lengths[f"{name}.weight"] = d
        if arch.norm_bias:
            lengths[f"{name}.bias"] = d

    for i in range(arch.n_layers):
        for block in ("attn", "ffn"):
            norm(f"layers.{i}.{block}.norm")
            if arch.norm_place == "sandwich":
                norm(f"layers.{i}.{block}.post_norm")
        at = f"layers.{i}.attn"
        if arch.qk_norm:
            lengths |= {f"{at}.q_norm.weight": arch.head_dim, f"{at}.k_norm.weight": arch.head_dim}
        if arch.qkv_bias:
            lengths |= {f"{at}.q.bias": heads, f"{at}.k.bias": kv, f"{at}.v.bias": kv}
        if arch.o_bias:
            lengths[f"{at}.o.bias"] = d
        if arch.ffn_bias:
            lengths[f"layers.{i}.ffn.down.bias"] = d
    if arch.final_norm:
        norm("final_norm")
    return lengths


def neuron_matrices(arch: Architecture, layer: int) -> dict[str, str]:
    """Segment of the bundle -> canonical name, for one FFN; each is (n_neurons, d_model)."""
    parts = ("gate", "up", "down") if arch.gated else ("up", "down")
    return {part: f"layers.{layer}.ffn.{part}.weight" for part in parts}


def neuron_biases(arch: Architecture, layer: int) -> list[str]:
    """Names of the per-neuron biases in the order of the bundle's bias segment, each (n_neurons,)."""
    if not arch.ffn_bias:
        return []
    parts = ("gate", "up") if arch.gated else ("up",)
    return [f"layers.{layer}.ffn.{part}.bias" for part in parts]


def ffn_name(layer: int) -> str:
    """Name of the FFN's tensor in ``neurons.safetensors``."""
    return f"layers.{layer}.ffn"
