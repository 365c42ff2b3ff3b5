"""Tiny GGUF files, written by gguf-py, for the tests of the importer."""

import string

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

BASE = {"d": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "neurons": 96, "vocab": 320}
FAMILIES = {
    "llama": ({}, {}),
    "qwen2": ({"biases": ("attn_q", "attn_k", "attn_v"), "tied": True}, {}),
    "qwen3": ({"qk_norm": True}, {}),
    "gemma3": (
        {"qk_norm": True, "sandwich": True, "tied": True},
        {"gemma3.attention.sliding_window": 16, "gemma3.rope.freq_base": 1e6},
    ),
    "arcee": ({"gated": False}, {}),
    "nemotron": (
        {"gated": False, "biases": ("attn_norm", "ffn_norm")},
        {
            "nemotron.attention.layer_norm_epsilon": 1e-5,
            "nemotron.attention.layer_norm_rms_epsilon": None,
            "nemotron.rope.dimension_count": 8,
        },
    ),
}
"""llama.cpp's name -> (arguments of ``shapes``, keys beside the usual ones)."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def shapes(sizes=BASE, *, gated=True, qk_norm=False, biases=(), sandwich=False, tied=False):
    """GGUF's name -> shape of every tensor."""
    d, n, h = sizes["d"], sizes["neurons"], sizes["head_dim"]
    q, kv = sizes["heads"] * h, sizes["kv_heads"] * h
    found = {"token_embd.weight": (sizes["vocab"], d), "output_norm.weight": (d,)}
    if not tied:
        found["output.weight"] = (sizes["vocab"], d)
    for i in range(sizes["layers"]):
        at = f"blk.{i}"
        found |= {
            f"{at}.attn_norm.weight": (d,), f"{at}.attn_q.weight": (q, d), f"{at}.attn_k.weight": (kv, d),
            f"{at}.attn_v.weight": (kv, d), f"{at}.attn_output.weight": (d, q), f"{at}.ffn_norm.weight": (d,),
            f"{at}.ffn_up.weight": (n, d), f"{at}.ffn_down.weight": (d, n),
        }  # fmt: skip
        if gated:
            found[f"{at}.ffn_gate.weight"] = (n, d)
        if qk_norm:
            found |= {f"{at}.attn_q_norm.weight": (h,), f"{at}.attn_k_norm.weight": (h,)}
        if sandwich:
            found |= {f"{at}.post_attention_norm.weight": (d,), f"{at}.post_ffw_norm.weight": (d,)}
        for part in biases:
            found[f"{at}.{part}.bias"] = (found[f"{at}.{part}.weight"][0],)
    return found


def random_tensors(shaped, kind=Type.F32, seed=0):
    """Name -> (bytes or floats as gguf-py wants them, type, exact float32 values); vectors stay F32."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shaped.items():
        values = random.standard_normal(shape, np.float32) * np.float32(0.1)
        own = Type.F32 if len(shape) == 1 else kind
        if name.endswith("norm.weight"):
            values += 1
        data = quantize(values, own)
        tensors[name] = (data, own, dequantize(data, own))
    return tensors


def write(path, tensors, *, arch="llama", sizes=BASE, keys=None, vocabulary=None, **options):
    """Write a file with the usual keys of ``arch``, changed by ``keys`` (None removes one)."""
    writer = gguf.GGUFWriter(path, arch, **options)
    described = {
        "context_length": 128, "embedding_length": sizes["d"], "block_count": sizes["layers"],
        "feed_forward_length": sizes["neurons"], "attention.head_count": sizes["heads"],
        "attention.head_count_kv": sizes["kv_heads"], "attention.key_length": sizes["head_dim"],
        "attention.value_length": sizes["head_dim"], "rope.dimension_count": sizes["head_dim"],
        "rope.freq_base": 10000.0, "attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    described = {f"{arch}.{key}": value for key, value in described.items()}
    described |= letters(sizes["vocab"]) if vocabulary is None else vocabulary
    for key, value in (described | (keys or {})).items():
        if value is not None:
            add(writer, key, value)
    for name, (data, kind, _) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def letters(size):
    """A SentencePiece vocabulary with all bytes, letters and the space, filled up to ``size`` pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    tokens = (tokens + list(string.ascii_letters) + [f"<pad{i}>" for i in range(size)])[:size]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (size - 259)
    return vocabulary("llama", tokens, types=types, scores=[-float(i) for i in range(size)])


def vocabulary(model, tokens, **changes):
    """The keys of a tokenizer: ``types``, ``scores``, ``merges`` and others of ``tokenizer.ggml.``"""
    named = {"types": "token_type"}
    keys = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": list(tokens)}
    return keys | {f"tokenizer.ggml.{named.get(key, key)}": value for key, value in changes.items()}
