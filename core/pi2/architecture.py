"""What a model is, whatever file it came from: the hyper-parameters of every family in one frozen value.

Families (``pi2.families``) translate foreign configurations into this; the engine reads nothing else.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pi2.errors import FormatError

Activation = Literal["relu", "relu2", "silu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding over the first ``dims`` of each head, halves paired (i, i + dims/2).

    ``kind`` is the scaling of the frequencies: "none"; "linear" (positions / factor); "llama3"
    (low frequencies / factor, with a smooth band); "yarn" (NTK by parts, and cos/sin x attn_factor).
    """

    theta: float
    dims: int
    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attn_factor: float = 1.0

    def check(self, head_dim: int) -> None:
        """Raise FormatError unless the numbers give finite frequencies."""
        if not (0 < self.dims <= head_dim and self.dims % 2 == 0):
            raise FormatError(f"RoPE over {self.dims} of {head_dim} dimensions cannot be")
        if not (1 < self.theta < 1e12 and 1e-6 < self.factor < 1e6):
            raise FormatError(f"RoPE theta {self.theta}, factor {self.factor} cannot be")
        if self.kind in ("llama3", "yarn") and not 0 < self.original_context <= 1 << 24:
            raise FormatError(f"RoPE over {self.original_context} tokens of original context cannot be")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < 1e6:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise FormatError(f"RoPE low_freq_factor {low}, high_freq_factor {high} cannot be")
        if self.kind == "yarn" and not 1e-6 < self.beta_slow <= self.beta_fast < 1e6:
            raise FormatError(f"RoPE beta_slow {self.beta_slow}, beta_fast {self.beta_fast} cannot be")
        if not 0 < self.attn_factor < 1e6:
            raise FormatError(f"RoPE attn_factor {self.attn_factor} cannot be")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only transformer.  Shapes below: d = d_model, h = head_dim."""

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_neurons: int  # per FFN
    max_context: int

    norm: Literal["rms", "layer"] = "rms"  # weights are stored as plain factors (no "1 + w")
    norm_eps: float = 1e-5
    norm_place: Literal["pre", "post", "sandwich"] = "pre"  # sandwich: before and after (Gemma 3)
    final_norm: bool = True
    qk_norm: bool = False  # RMSNorm of every q and k head, before RoPE

    activation: Activation = "silu"
    gated: bool = True  # act(gate x) * (up x); without a gate: act(up x)
    up_relu: bool = False  # dReLU: relu(gate x) * relu(up x)  (TurboSparse §3)

    qkv_bias: bool = False
    o_bias: bool = False
    ffn_bias: bool = False  # gate and up biases lie in the bundles, the down bias beside the norms
    norm_bias: bool = False

    rope: Rope | None = None  # None: learned positions, added to the embedding
    local_rope: Rope | None = None  # for the layers with a sliding window, where it differs
    window: int | None = None  # a token sees itself and window - 1 tokens before it
    window_layers: tuple[bool, ...] = ()  # per layer; empty: all of them, if there is a window
    attn_scale: float = 1.0  # of q.k; usually head_dim ** -0.5
    attn_softcap: float | None = None

    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False  # the head is the embedding

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether the activation makes exact zeros."""
        return self.activation in ("relu", "relu2")

    def has_window(self, layer: int) -> bool:
        return self.window is not None and (not self.window_layers or self.window_layers[layer])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Architecture:
        """Read back ``to_dict``, treating the input as hostile.  Raises FormatError."""
        value: Architecture = _build(cls, raw, "config.json")
        value.check()
        return value

    def check(self) -> None:
        """Raise FormatError unless the numbers can belong to a model."""
        limit = 1 << 24
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim",
                     "n_neurons", "max_context"):  # fmt: skip
            if not 0 < getattr(self, name) <= limit:
                raise FormatError(f"{name} = {getattr(self, name)} cannot be")
        for token in (self.bos_id or 0, *self.eos_ids):
            if not 0 <= token < self.vocab_size:
                raise FormatError(f"the special token {token} is outside of the vocabulary")
        if self.n_layers > 4096:
            raise FormatError(f"n_layers = {self.n_layers} cannot be")
        if self.n_heads % self.n_kv_heads:
            raise FormatError(f"{self.n_heads} heads cannot share {self.n_kv_heads} KV heads")
        if self.window is not None and self.window < 1:
            raise FormatError(f"window = {self.window} cannot be")
        if self.window_layers and len(self.window_layers) != self.n_layers:
            raise FormatError("window_layers does not name every layer")
        for rope in (self.rope, self.local_rope):
            if rope:
                rope.check(self.head_dim)


def _build(cls: type[Any], raw: Mapping[str, Any], where: str) -> Any:
    """Dataclass from a mapping whose keys and types are checked against the annotations."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(raw, Mapping) or not set(raw) <= set(fields):
        raise FormatError(f"{where} is not a description of a model")
    given = {}
    for name, field in fields.items():
        if name in raw:
            given[name] = _checked(raw[name], hints[name], f"{where}: {name}")
        elif field.default is dataclasses.MISSING:
            raise FormatError(f"{where} lacks {name}")
    return cls(**given)


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        if value is None and types.NoneType in args:
            return None
        return _checked(value, next(a for a in args if a is not types.NoneType), where)
    if origin is Literal:
        good = isinstance(value, str) and value in args
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_checked(v, args[0], where) for v in value)
        good = False
    elif dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)
        return _build(hint, value, where)
    elif hint is float:
        good = type(value) in (int, float) and abs(value) <= sys.float_info.max  # also refuses NaN
    else:
        good = type(value) is hint
    if not good:
        raise FormatError(f"{where} has an impossible value {str(value)[:60]!r}")
    return float(value) if hint is float else value
