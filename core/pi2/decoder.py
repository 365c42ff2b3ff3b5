"""The forward pass, written once for every family.  Shapes: n tokens, d = d_model.

Prefill is dense and asks no predictor; a single token asks the predictor which neurons may fire and
computes only those (PowerInfer-2 §4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pi2.api import Backend, FfnSpec, Predictor
from pi2.attention import attend
from pi2.inventory import dense_matrices, dense_vectors
from pi2.kv_cache import KvCache
from pi2.rope import RopeTable
from pi2.tensor import F32, Tensor

if TYPE_CHECKING:
    from pi2.container.reader import PiModel

TokenIds = NDArray[np.int64]


@dataclass(slots=True)
class FfnCount:
    """How many (token, neuron) pairs were active, of how many."""

    active: int = 0
    total: int = 0


class Decoder:
    """A model placed on a backend: token ids in, logits out."""

    def __init__(self, model: PiModel, backend: Backend, predictor: Predictor) -> None:
        arch = model.architecture
        self.arch = arch
        self.ffn_count = FfnCount()
        self._backend = backend
        self._predictor = predictor
        matrices = dense_matrices(arch)
        self._rows = {name: rows for name, (rows, _) in matrices.items()}
        self._tables = {name: model.matrix(name) for name in matrices if name.startswith("embed.")}
        placed = [name for name in matrices if name not in self._tables]
        self._weights: dict[str, Any] = {name: backend.place(model.matrix(name)) for name in placed}
        if arch.tied:
            self._weights["head.weight"] = backend.place(self._tables["embed.weight"])
            self._rows["head.weight"] = arch.vocab_size
        self._vectors = {name: model.vector(name) for name in dense_vectors(arch)}
        spec = FfnSpec(model.geometry, arch.activation, arch.up_relu)
        self._ffns = [backend.place_ffn(model.bundles(i), spec) for i in range(arch.n_layers)]
        self._rope = RopeTable(arch.rope) if arch.rope else None
        self._local_rope = RopeTable(arch.local_rope) if arch.local_rope else self._rope

    def forward(self, ids: TokenIds, cache: KvCache, *, all_logits: bool = False) -> F32:
        """Append ``ids`` (n,) to ``cache``; logits of the last token (vocab,), or of all (n, vocab)."""
        n = len(ids)
        cache.reserve(cache.length + n)
        x = self._embed(ids, cache.length)  # (n, d)
        for layer in range(self.arch.n_layers):
            x = self._block(x, layer, "attn", self._attention(layer, cache))
            x = self._block(x, layer, "ffn", self._ffn(layer))
        cache.advance(n)
        if not all_logits:
            x = x[-1:]
        logits = self._logits(x)
        return logits if all_logits else logits[0]

    def _embed(self, ids: TokenIds, start: int) -> F32:
        x = _gather(self._tables["embed.weight"], ids)
        if self.arch.embed_scale != 1:
            x *= np.float32(self.arch.embed_scale)
        if "embed.positions" in self._tables:
            x += _gather(self._tables["embed.positions"], np.arange(start, start + len(ids)))
        return x

    def _block(self, x: F32, layer: int, name: str, compute: Any) -> F32:
        """One residual branch, with its norm before it, behind it, or on both sides."""
        norm = f"layers.{layer}.{name}.norm"
        if self.arch.norm_place == "post":
            return self._norm(x + compute(x), norm)
        y: F32 = compute(self._norm(x, norm))
        if self.arch.norm_place == "sandwich":
            y = self._norm(y, f"layers.{layer}.{name}.post_norm")
        return x + y

    def _attention(self, layer: int, cache: KvCache) -> Any:
        arch, at = self.arch, f"layers.{layer}.attn"
        windowed = arch.has_window(layer)
        rope = self._local_rope if windowed else self._rope

        def heads(x: F32, name: str, count: int) -> F32:
            y = self._linear(x, f"{at}.{name}").reshape(len(x), count, arch.head_dim)
            if arch.qk_norm and name != "v":
                y = _rms_norm(y, self._vectors[f"{at}.{name}_norm.weight"], arch.norm_eps)
            y = y.swapaxes(0, 1)  # (count, n, head_dim)
            return rope.rotate(y, cache.length) if rope and name != "v" else y

        def compute(x: F32) -> F32:
            q = heads(x, "q", arch.n_heads)
            k, v = heads(x, "k", arch.n_kv_heads), heads(x, "v", arch.n_kv_heads)
            keys, values = cache.append(layer, k, v)
            window = arch.window if windowed else None
            y = attend(q, keys, values, scale=arch.attn_scale, window=window, softcap=arch.attn_softcap)
            return self._linear(y, f"{at}.o")

        return compute

    def _ffn(self, layer: int) -> Any:
        def compute(x: F32) -> F32:
            rows = self._predictor.predict(layer, x) if len(x) == 1 else None
            out = np.empty_like(x)
            self.ffn_count.active += self._backend.ffn(self._ffns[layer], x, out, rows)
            self.ffn_count.total += len(x) * self.arch.n_neurons
            bias = self._vectors.get(f"layers.{layer}.ffn.down.bias")
            return out if bias is None else out + bias

        return compute

    def _linear(self, x: F32, name: str) -> F32:
        """(n, cols) -> (n, rows) through the weight and bias called ``name``."""
        weight = f"{name}.weight"
        out = np.empty((len(x), self._rows[weight]), np.float32)
        self._backend.linear(self._weights[weight], np.ascontiguousarray(x), out)
        bias = self._vectors.get(f"{name}.bias")
        return out if bias is None else out + bias

    def _norm(self, x: F32, name: str) -> F32:
        weight, bias = self._vectors[f"{name}.weight"], self._vectors.get(f"{name}.bias")
        if self.arch.norm == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        y = _rms_norm(x, weight, self.arch.norm_eps)  # of centred values: the layer norm
        return y if bias is None else y + bias

    def _logits(self, x: F32) -> F32:
        if self.arch.final_norm:
            x = self._norm(x, "final_norm")
        logits = self._linear(x, "head")
        if self.arch.logit_scale != 1:
            logits *= np.float32(self.arch.logit_scale)
        if self.arch.logit_softcap is not None:
            cap = np.float32(self.arch.logit_softcap)
            logits = np.tanh(logits / cap) * cap
        return logits


def _rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """(..., d) / root mean square over the last axis * weight."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    y: F32 = x / np.sqrt(mean_square + np.float32(eps)) * weight
    return y


def _gather(table: Tensor, ids: NDArray[Any]) -> F32:
    """Rows of a table, decoded: nothing but these rows is read from it."""
    return table.to_f32(np.asarray(ids, np.int32)).copy()
