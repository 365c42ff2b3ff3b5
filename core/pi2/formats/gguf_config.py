"""What a GGUF file says about its model, in the keys of Hugging Face's config.json.

A family (``pi2.families``) reads the result as if it were a config.json, so nothing here knows families,
except for the few facts that GGUF leaves to the reader's knowledge of the architecture.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import numpy as np

from pi2.errors import FormatError, UnsupportedModel
from pi2.formats.gguf_metadata import Metadata
from pi2.tensor import F32

# Keys after "{arch}." that are read below.
_READ_NAMES = """
    attention.head_count attention.head_count_kv attention.key_length attention.layer_norm_epsilon
    attention.layer_norm_rms_epsilon attention.scale attention.sliding_window
    attention.sliding_window_pattern attention.value_length attn_logit_softcapping block_count
    context_length embedding_length feed_forward_length final_logit_softcapping logit_scale
    rope.dimension_count rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.attn_factor
    rope.scaling.factor rope.scaling.original_context_length rope.scaling.type
    rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
    rope.scaling.yarn_ext_factor
"""
# Keys that change nothing in what the model computes.
_INERT_NAMES = "attention.causal rope.scaling.finetuned tensor_data_layout vocab_size"
_KNOWN = frozenset((_READ_NAMES + _INERT_NAMES).split())
# Every so many layers one attends to everything, the others through a window (llama.cpp: set_swa_pattern).
_WINDOW_PERIODS = {"gemma3": 6}


def config_of(meta: Metadata, arch: str, vocab_size: int, tensors: Container[str]) -> dict[str, Any]:
    """Keys of a config.json, only those that the file gives a value to.

    ``rope_freqs.weight``, if there is one, is not looked at (see :func:`llama3_scaling`).
    Raises UnsupportedModel for a key that would be overlooked, FormatError for values of a wrong type.
    """
    _refuse_unknown(meta, arch)
    d, layers = meta.integer(f"{arch}.embedding_length"), meta.integer(f"{arch}.block_count")
    heads = meta.integer(f"{arch}.attention.head_count")
    if min(d, layers, heads) < 1:
        raise FormatError(f"{meta.file}: {layers} layers of width {d} with {heads} heads cannot be")
    head_dim = meta.integer(f"{arch}.attention.key_length", d // heads)
    if head_dim < 1 or meta.integer(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{meta.file}: keys and values of different widths are not supported")
    config: dict[str, Any] = {
        "hidden_size": d,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": meta.integer(f"{arch}.feed_forward_length"),
        "max_position_embeddings": meta.integer(f"{arch}.context_length"),
        "vocab_size": vocab_size,
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for part in (_norm, _rope, _attention):
        config |= part(meta, arch, head_dim, config)
    if "pi2.hidden_act" in meta:
        name = "hidden_activation" if arch.startswith("gemma") else "hidden_act"
        config[name] = meta.text("pi2.hidden_act")
    return config


def _refuse_unknown(meta: Metadata, arch: str) -> None:
    if meta.pairs.get(f"{arch}.attention.causal") is False:
        raise UnsupportedModel(f"{meta.file} is an encoder: it attends in both directions")
    for key, value in meta.pairs.items():
        group, _, name = key.partition(".")
        off = type(value) in (int, float, bool, str) and not value
        if group == arch and name not in _KNOWN and not off:
            shown = repr(value)[:40] if type(value) in (int, float, bool, str) else "an array"
            raise UnsupportedModel(
                f"{meta.file}: {key} = {shown} asks for something that pi2 does not compute",
                hint="pi2 runs dense decoder-only models",
            )


def _norm(meta: Metadata, arch: str, head_dim: int, config: dict[str, Any]) -> dict[str, Any]:
    if f"{arch}.attention.layer_norm_epsilon" in meta:
        return {"norm_eps": meta.number(f"{arch}.attention.layer_norm_epsilon")}
    return {"rms_norm_eps": meta.number(f"{arch}.attention.layer_norm_rms_epsilon")}


def _attention(meta: Metadata, arch: str, head_dim: int, config: dict[str, Any]) -> dict[str, Any]:
    """The scale of the scores, caps, and which layers have a window."""
    found: dict[str, Any] = {}
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale"):
        if meta.number(f"{arch}.{name}", 0.0):
            found[name] = meta.number(f"{arch}.{name}")
    d, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    scale = meta.number(f"{arch}.attention.scale", 0.0)
    if scale < 0:
        raise FormatError(f"{meta.file}: attention.scale = {scale} cannot be")
    if scale:
        found["query_pre_attn_scalar"] = scale**-2
    elif arch == "gemma3":
        # The file does not say; llama.cpp, too, knows the 27B model by its 62 layers.
        found["query_pre_attn_scalar"] = d // heads if layers == 62 else head_dim
    window = meta.integer(f"{arch}.attention.sliding_window", 0)
    if window:
        found["sliding_window"] = window
        found["layer_types"] = _layer_types(meta, arch, layers)
    elif arch in _WINDOW_PERIODS:
        found["sliding_window"] = None
    return found


def _layer_types(meta: Metadata, arch: str, layers: int) -> list[str]:
    key = f"{arch}.attention.sliding_window_pattern"
    pattern = meta.pairs.get(key)
    if isinstance(pattern, np.ndarray):
        local = [bool(x) for x in meta.numbers(key, layers)]
    else:
        # One beyond the last layer: without a pattern no layer attends to everything.
        _check_layers(meta, layers)
        period = meta.integer(key, _WINDOW_PERIODS.get(arch, layers + 1))
        local = [period == 0 or (i + 1) % period > 0 for i in range(layers)]
    return ["sliding_attention" if x else "full_attention" for x in local]


def _check_layers(meta: Metadata, layers: int) -> None:
    if layers > 4096:
        raise FormatError(f"{meta.file}: {layers} layers cannot be")


def _rope(meta: Metadata, arch: str, head_dim: int, config: dict[str, Any]) -> dict[str, Any]:
    dims = meta.integer(f"{arch}.rope.dimension_count", head_dim)
    found: dict[str, Any] = {
        "rope_theta": meta.number(f"{arch}.rope.freq_base", 10_000.0),
        # Rounded up by a hair, so that share * head_dim does not fall below the whole number it stands for.
        "partial_rotary_factor": 1.0 if dims == head_dim else math.nextafter(dims / head_dim, 2.0),
    }
    if f"{arch}.rope.freq_base_swa" in meta:
        found["rope_local_base_freq"] = meta.number(f"{arch}.rope.freq_base_swa")
    if arch == "gemma3":
        del found["partial_rotary_factor"]
        if dims != head_dim:
            raise UnsupportedModel(f"{meta.file}: RoPE over {dims} of {head_dim} dimensions is not supported")
    scaling = _scaling(meta, arch, config["max_position_embeddings"])
    return found | ({"rope_scaling": scaling} if scaling else {})


def _scaling(meta: Metadata, arch: str, context: int) -> dict[str, Any] | None:
    at = f"{arch}.rope.scaling"
    factor = meta.number(f"{at}.factor", meta.number(f"{arch}.rope.scale_linear", 0.0))
    kind = meta.text(f"{at}.type", "linear" if factor else "none")
    attention = meta.number(f"{at}.attn_factor", 1.0) * meta.number(f"{at}.yarn_attn_factor", 1.0)
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear" and attention == 1.0:
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or meta.number(f"{at}.yarn_ext_factor", 1.0) != 1.0 or factor < 1:
        raise UnsupportedModel(
            f"{meta.file}: RoPE scaling of the kind {kind[:40]!r} with these parameters is not supported",
            hint="supported: linear, yarn, and Llama 3's",
        )
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": meta.integer(f"{at}.original_context_length", context),
        # llama.cpp multiplies YaRN's own factor (arXiv 2309.00071 §3.4) by that of the file.
        "attention_factor": attention * (1.0 + 0.1 * math.log(factor)),
        "beta_fast": meta.number(f"{at}.yarn_beta_fast", 32.0),
        "beta_slow": meta.number(f"{at}.yarn_beta_slow", 1.0),
    }


def llama3_scaling(divisors: F32, theta: float, original: int) -> dict[str, Any] | None:
    """Llama 3's RoPE parameters from ``rope_freqs.weight`` (dims / 2,), by which GGUF divides frequencies.

    The divisor is 1 for short wavelengths, ``factor`` for long ones, and between ``original / high`` and
    ``original / low`` its inverse is a straight line in 1 / wavelength.  Only the ratios of the three are
    determined, so ``low`` is taken to be 1, as in all models.  None if the divisors scale nothing.
    ``original`` is tried first as the original context.  Raises UnsupportedModel if no parameters fit.
    """
    values = divisors.astype(np.float64)
    if np.isfinite(values).all() and (abs(values - 1) < 1e-6).all():
        return None
    n = len(values)
    cycles = theta ** (-np.arange(n) / n) / (2 * math.pi)  # 1 / wavelength
    factor = float(values.max()) if np.isfinite(values).all() else 0.0
    for context, high in _candidates(values, cycles, factor, original):
        smooth = np.clip((context * cycles - 1) / (high - 1), 0, 1)
        if np.allclose((1 - smooth) / factor + smooth, 1 / values, rtol=1e-4, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedModel(
        "rope_freqs.weight is not a scaling of Llama 3's kind",
        hint="longrope and su scaling are not supported",
    )


def _candidates(values: Any, cycles: Any, factor: float, original: int) -> list[tuple[int, float]]:
    """(original context, high_freq_factor) worth trying: the usual ones, then the line through the band."""
    if not (values >= 1 - 1e-6).all() or not 1 < factor < 1e6:
        return []
    usual = [(original, 4.0), (8192, 4.0)]
    share = (1 / values - 1 / factor) / (1 - 1 / factor)
    band = (share > 1e-4) & (share < 1 - 1e-4)
    if band.sum() < 2:
        return usual
    slope, start = np.polyfit(cycles[band], share[band], 1)
    if not start < -1e-6:
        return usual
    high = 1 - 1 / start
    context = slope * (high - 1)
    return [*usual, (round(context), float(high))] if 1 <= context < 1 << 24 else usual
