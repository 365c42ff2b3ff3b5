"""The forward pass of ``pi2.decoder`` in PyTorch, for training: every family, rows packed with documents.

Shapes: T tokens in a row, d = d_model, h = head_dim.  Weights go by their canonical names
(``pi2.inventory``), matrices as (rows, cols), W_down neuron-major.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pi2.architecture import Architecture
from pi2.relufy.corpus import Row
from pi2.rope import RopeTable

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


@dataclass(frozen=True, slots=True)
class Place:
    """What attention needs to know of a row, for layers with and without a window."""

    hidden: tuple[Tensor, Tensor]
    """(T, T) bool each: what a token does not see, everywhere and in a window."""
    turns: tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]
    """Cosines and sines (T, dims / 2) of either RoPE."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a forward pass leaves behind."""

    streams: list[Tensor]
    """(T, d): the input of every layer, and behind them the output of the last."""
    gates: list[Tensor]
    """(T, neurons) per layer: what the activation function was given."""


class Network:
    """A model as functions of its weights.  Holds no state but them, so that threads may share it."""

    def __init__(self, arch: Architecture, weights: Mapping[str, Tensor]) -> None:
        self.arch = arch
        self.weights = weights
        self._ropes = tuple(RopeTable(r) if r else None for r in (arch.rope, arch.local_rope or arch.rope))

    def place(self, row: Row) -> Place:
        """Prepare the attention of a row."""
        positions, documents = torch.from_numpy(row.positions), torch.from_numpy(row.documents)
        age = positions[:, None] - positions[None]
        apart = documents[:, None] != documents[None]
        everywhere = apart | (age < 0)
        window = everywhere if self.arch.window is None else everywhere | (age >= self.arch.window)
        tables = (r and r.until(int(row.positions.max()) + 1) for r in self._ropes)
        turns = [t and tuple(torch.from_numpy(part[row.positions]) for part in t) for t in tables]
        return Place((everywhere, window), tuple(turns))  # type: ignore[arg-type]  # two pairs or None

    def trace(self, row: Row) -> Trace:
        """Run all layers over a row."""
        place, gates = self.place(row), []
        streams = [self.embed(row)]
        for layer in range(self.arch.n_layers):
            x = self.attention(streams[-1], layer, place)
            gate, term = self.ffn(self.before_ffn(x, layer), layer)
            gates.append(gate)
            streams.append(self.after_ffn(x, term, layer))
        return Trace(streams, gates)

    def embed(self, row: Row) -> Tensor:
        """(T, d)"""
        x = F.embedding(torch.from_numpy(row.ids), self.weights["embed.weight"]) * self.arch.embed_scale
        if self.arch.rope is None:
            x = x + F.embedding(torch.from_numpy(row.positions), self.weights["embed.positions"])
        return x

    def attention(self, x: Tensor, layer: int, place: Place) -> Tensor:
        """The attention block with its norms and its residual connection, (T, d) -> (T, d)."""
        at, post = f"layers.{layer}.attn", self.arch.norm_place == "post"
        y = self._attend(x if post else self._norm(x, f"{at}.norm"), layer, place)
        return self._join(x, y, at)

    def before_ffn(self, x: Tensor, layer: int) -> Tensor:
        """What the FFN of a layer is given, (T, d)."""
        return x if self.arch.norm_place == "post" else self._norm(x, f"layers.{layer}.ffn.norm")

    def hidden(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Gate values and activations of the neurons, (T, d) -> twice (T, neurons)."""
        at = f"layers.{layer}.ffn"
        up = self._linear(x, f"{at}.up")
        if not self.arch.gated:
            return up, self._activate(up)
        gate = self._linear(x, f"{at}.gate")
        return gate, self._activate(gate) * (F.relu(up) if self.arch.up_relu else up)

    def ffn(self, x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Gate values (T, neurons), and what the neurons add up to with the bias (T, d)."""
        gate, active = self.hidden(x, layer)
        term = active @ self.weights[f"layers.{layer}.ffn.down.weight"]
        bias = self.weights.get(f"layers.{layer}.ffn.down.bias")
        return gate, term if bias is None else term + bias

    def after_ffn(self, x: Tensor, term: Tensor, layer: int) -> Tensor:
        """The residual connection of the FFN block, (T, d)."""
        return self._join(x, term, f"layers.{layer}.ffn")

    def logits(self, x: Tensor) -> Tensor:
        """(n, d) from the last layer -> (n, vocab)."""
        arch = self.arch
        if arch.final_norm:
            x = self._norm(x, "final_norm")
        logits = x @ self.weights["embed.weight" if arch.tied else "head.weight"].T
        if arch.logit_scale != 1:
            logits = logits * arch.logit_scale
        return logits if arch.logit_softcap is None else _softcap(logits, arch.logit_softcap)

    def _join(self, x: Tensor, y: Tensor, at: str) -> Tensor:
        if self.arch.norm_place == "sandwich":
            y = self._norm(y, f"{at}.post_norm")
        return self._norm(x + y, f"{at}.norm") if self.arch.norm_place == "post" else x + y

    def _attend(self, x: Tensor, layer: int, place: Place) -> Tensor:
        arch, at, windowed = self.arch, f"layers.{layer}.attn", self.arch.has_window(layer)
        group = arch.n_heads // arch.n_kv_heads

        def heads(name: str, count: int) -> Tensor:
            y = self._linear(x, f"{at}.{name}").view(len(x), count, arch.head_dim)
            if arch.qk_norm and name != "v":
                y = self._norm(y, f"{at}.{name}_norm", "rms")
            y = y.transpose(0, 1)  # (count, T, h)
            turn = place.turns[windowed]
            return _rotate(y, *turn) if turn and name != "v" else y

        q = heads("q", arch.n_heads).reshape(arch.n_kv_heads, group, len(x), arch.head_dim)
        k, v = heads("k", arch.n_kv_heads), heads("v", arch.n_kv_heads)
        scores = q @ k[:, None].transpose(-1, -2) * arch.attn_scale  # (kv_heads, group, T, T)
        if arch.attn_softcap is not None:
            scores = _softcap(scores, arch.attn_softcap)
        scores = scores.masked_fill(place.hidden[windowed], float("-inf")).softmax(-1)
        mixed = (scores @ v[:, None]).reshape(arch.n_heads, len(x), arch.head_dim)
        return self._linear(mixed.transpose(0, 1).reshape(len(x), -1), f"{at}.o")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str, kind: str | None = None) -> Tensor:
        if (kind or self.arch.norm) == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.arch.norm_eps)
        x, bias = x * self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return x if bias is None else x + bias

    def _activate(self, x: Tensor) -> Tensor:
        kind = self.arch.activation
        if kind == "silu":
            return F.silu(x)
        if kind in _GELU:
            return F.gelu(x, approximate=_GELU[kind])
        return F.relu(x) if kind == "relu" else F.relu(x).square()


def _softcap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(count, T, h) with (T, dims / 2) each; dimensions behind ``dims`` stay."""
    half = cos.shape[1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*turned, x[..., 2 * half :]), -1)
