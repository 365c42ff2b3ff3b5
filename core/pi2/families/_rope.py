"""Rotary position embeddings as Hugging Face's configurations state them, old style and new."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pi2.architecture import Rope
from pi2.errors import FormatError, UnsupportedModel
from pi2.families._keys import Keys

_READ_NAMES = """
    rope_theta rope_type type factor original_max_position_embeddings low_freq_factor high_freq_factor
    attention_factor beta_fast beta_slow mscale mscale_all_dim truncate partial_rotary_factor
"""
_READ = frozenset(_READ_NAMES.split())
_KINDS = ("default", "linear", "llama3", "yarn")


def rope(keys: Keys, head_dim: int, max_context: int, *, partial: float = 1.0) -> Rope:
    """One RoPE for all layers: ``rope_scaling`` beside ``rope_theta``, or ``rope_parameters``.

    ``partial`` is the share of a head that is rotated if the configuration does not say.
    """
    old, new = keys.section("rope_scaling"), keys.section("rope_parameters")
    given = dict(old or new)  # the same precedence as in transformers
    given.setdefault("rope_theta", keys.number("rope_theta", 10_000.0))
    share = keys.value("partial_rotary_factor")
    given.setdefault("partial_rotary_factor", partial if share is None else share)
    return parse(keys, given, head_dim, max_context)


def parse(keys: Keys, given: Mapping[str, Any], head_dim: int, max_context: int) -> Rope:
    """One dictionary of RoPE parameters.  Raises UnsupportedModel for kinds that pi2 does not compute."""
    part = Keys(given, {})
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in _KINDS:
        raise UnsupportedModel(
            f"RoPE scaling of the kind {str(kind)[:40]!r} is not supported",
            hint=f"supported: {', '.join(_KINDS)}",
        )
    for name, value in given.items():
        if name not in _READ and value is not None:
            raise UnsupportedModel(f"the RoPE parameter {name[:40]!r} is not supported")
    share = part.number("partial_rotary_factor", 1.0)
    if not 0 < share <= 1:
        raise FormatError(f"config.json: RoPE over {share} of a head cannot be")
    plain = Rope(theta=part.number("rope_theta"), dims=int(head_dim * share))
    if kind == "default":
        return plain
    if kind == "linear":
        return Rope(theta=plain.theta, dims=plain.dims, kind="linear", factor=_factor(part))
    # transformers gives priority to the key outside of the dictionary
    context = keys.value("original_max_position_embeddings")
    if context is None:
        context = part.integer("original_max_position_embeddings", max_context)
    if type(context) is not int or not 0 < context <= 1 << 24:
        raise FormatError(f"config.json: original_max_position_embeddings = {str(context)[:40]} cannot be")
    return _llama3(part, plain, context) if kind == "llama3" else _yarn(part, plain, context, max_context)


def _factor(part: Keys, default: float | None = None) -> float:
    factor = part.number("factor", default)
    if not 0 < factor < 1e6:
        raise FormatError(f"config.json: RoPE factor {factor} cannot be")
    return factor


def _llama3(part: Keys, plain: Rope, context: int) -> Rope:
    low, high = part.number("low_freq_factor"), part.number("high_freq_factor")
    return Rope(
        theta=plain.theta,
        dims=plain.dims,
        kind="llama3",
        factor=_factor(part),
        original_context=context,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(part: Keys, plain: Rope, context: int, max_context: int) -> Rope:
    """YaRN (arXiv 2309.00071 §3.4); the default of the attention factor is the paper's."""
    factor = _factor(part, max_context / context)
    attention = part.positive_or_none("attention_factor")
    if attention is None:
        share, base = part.number("mscale", 0.0), part.number("mscale_all_dim", 0.0)
        attention = _mscale(factor, share) / _mscale(factor, base) if share and base else _mscale(factor)
    return Rope(
        theta=plain.theta,
        dims=plain.dims,
        kind="yarn",
        factor=factor,
        original_context=context,
        beta_fast=part.number("beta_fast", 0.0) or 32.0,
        beta_slow=part.number("beta_slow", 0.0) or 1.0,
        truncate=part.flag("truncate", True),
        attn_factor=attention,
    )


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
