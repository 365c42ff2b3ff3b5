"""The forward pass, written once for every family.  Shapes: n tokens, d = d_model.

Prefill is dense and asks no predictor; a single token asks the predictor which neurons may fire and
computes only those (PowerInfer-2 §4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pi2.api import Backend, Predictor
from pi2.attention import AttentionSpec, attend
from pi2.errors import Pi2Error
from pi2.ffns import Ffns, ResidentFfns
from pi2.inventory import dense_matrices, dense_vectors
from pi2.kv_cache import KvCache, KvDType
from pi2.norm import Norm
from pi2.powers import SupportsAttention
from pi2.rope import RopeTable
from pi2.tensor import F32, Ids

if TYPE_CHECKING:
    from pi2.container.reader import PiModel

TokenIds = NDArray[np.int64]
FfnObserver = Callable[[int, F32], None]
"""Hears of every FFN before it is computed: its number and its input (n, d), which it must not change."""


@dataclass(slots=True)
class FfnCount:
    """How many (token, neuron) pairs were active, of how many."""

    active: int = 0
    total: int = 0


class Decoder:
    """A model placed on a backend: token ids in, logits out.

    ``make_ffns`` is called when everything else is in memory; None keeps the FFNs there, too.
    ``attention``: another backend, for the attention blocks.
    """

    def __init__(
        self,
        model: PiModel,
        backend: Backend,
        predictor: Predictor,
        make_ffns: Callable[[], Ffns] | None = None,
        attention: Backend | None = None,
    ) -> None:
        arch = model.architecture
        self.arch = arch
        self.ffn_count = FfnCount()
        self.observer: FfnObserver | None = None
        self.head: Callable[[F32], F32] | None = None
        """Makes logits (n, vocab) of final states (n, d) in place of the LM head, before scale and cap."""
        self.attention_lost: Callable[[Pi2Error], None] | None = None
        """Hears of a failure of ``attention``: raises it, or calls ``take_attention``."""
        self.predictor = predictor  # may be exchanged for another that is attached
        self._backend = backend
        self._attends = attention or backend
        self._kv_dtype = kv_dtype(self._attends)
        self._model = model
        matrices = dense_matrices(arch)
        self._rows = {name: rows for name, (rows, _) in matrices.items()}
        tables = [name for name in matrices if name.startswith("embed.")]
        self._tables = {name: None if model.by_rows(name) else model.matrix(name) for name in tables}
        self._read_rows = model.rows
        self._weights: dict[str, Any] = {
            name: backend.place(model.matrix(name))
            for name in matrices
            if not name.startswith("embed.") and ".attn." not in name
        }
        table = self._tables["embed.weight"]
        if arch.tied and table is not None:  # by_rows wants it whole then
            self._weights["head.weight"] = backend.place(table)
            self._rows["head.weight"] = arch.vocab_size
        self._vectors = {name: model.vector(name) for name in dense_vectors(arch)}
        weights = [name for name in self._vectors if name.endswith("norm.weight")]
        self._norms = {name.removesuffix(".weight"): self._norm(name) for name in weights}
        self._rope = RopeTable(arch.rope) if arch.rope else None
        self._local_rope = RopeTable(arch.local_rope) if arch.local_rope else self._rope
        self._place_attention()
        self.ffns = make_ffns() if make_ffns else ResidentFfns(model, backend)

    def _place_attention(self) -> None:
        """All blocks, to where attention is computed: fused, if it can and takes this KV cache."""
        attends, arch = self._attends, self.arch
        self._fused: SupportsAttention | None = None
        if isinstance(attends, SupportsAttention) and attends.kv_dtype == self._kv_dtype:
            self._fused = attends
            specs = (self._attention_spec(layer) for layer in range(arch.n_layers))
            self._attentions = [attends.place_attention(spec) for spec in specs]
            return
        names = (name for name in dense_matrices(arch) if ".attn." in name)
        self._weights |= {name: attends.place(self._model.matrix(name)) for name in names}

    def take_attention(self) -> None:
        """From here on the main backend computes attention, too."""
        self._attends, self._attentions = self._backend, []
        self._place_attention()

    def new_cache(self, limit: int | None = None) -> KvCache:
        """An empty KV cache for ``limit`` tokens (None: the model's maximum), as the backend wants it."""
        return KvCache(self.arch, limit, self._kv_dtype)

    def forward(self, ids: TokenIds, cache: KvCache, *, all_logits: bool = False) -> F32:
        """Append ``ids`` (n,) to ``cache``; logits of the last token (vocab,), or of all (n, vocab)."""
        return self.forward_chunks([ids], cache, all_logits=all_logits)

    def forward_chunks(self, chunks: Sequence[TokenIds], cache: KvCache, *, all_logits: bool = False) -> F32:
        """``forward`` of the chunks one after the other, with the same bits, but layer by layer:

        every FFN computes all chunks before the next one is needed, which is read once for all.
        """
        starts = np.cumsum([cache.length, *map(len, chunks)]).tolist()
        cache.reserve(starts[-1])
        xs = [self._embed(ids, start) for ids, start in zip(chunks, starts, strict=False)]  # (n, d) each
        tokens = [len(x) for x in xs]
        for layer in range(self.arch.n_layers):
            self.ffns.expect(layer, tokens)
            xs = [self._attention_block(x, layer, cache, start) for x, start in zip(xs, starts, strict=False)]
            xs = self._ffn_block(xs, layer)
        cache.advance(starts[-1] - starts[0])
        if all_logits:
            return np.concatenate([self._logits(x) for x in xs])
        last: F32 = self._logits(xs[-1][-1:])[0]
        return last

    def _embed(self, ids: TokenIds, start: int) -> F32:
        x = self._gather("embed.weight", ids)
        if self.arch.embed_scale != 1:
            x *= np.float32(self.arch.embed_scale)
        if "embed.positions" in self._tables:
            x += self._gather("embed.positions", np.arange(start, start + len(ids)))
        return x

    def _gather(self, name: str, ids: NDArray[Any]) -> F32:
        """Rows of a table, decoded: nothing but these rows is read from it."""
        rows, table = np.asarray(ids, np.int32), self._tables[name]
        found = self._read_rows(name, rows).to_f32() if table is None else table.to_f32(rows)
        return found.copy()

    def _before(self, x: F32, layer: int, name: str) -> F32:
        """What a residual branch computes on: ``x`` behind the norm before it, if it has one."""
        return x if self.arch.norm_place == "post" else self._norms[f"layers.{layer}.{name}.norm"](x)

    def _after(self, x: F32, y: F32, layer: int, name: str) -> F32:
        """``x`` plus the branch's ``y``, with the norm behind it or around the sum, if it has one."""
        if self.arch.norm_place == "post":
            normed: F32 = self._norms[f"layers.{layer}.{name}.norm"](x + y)
            return normed
        if self.arch.norm_place == "sandwich":
            y = self._norms[f"layers.{layer}.{name}.post_norm"](y)
        return x + y

    def _attention_block(self, x: F32, layer: int, cache: KvCache, start: int) -> F32:
        try:
            return self._attend(x, layer, cache, start)
        except Pi2Error as e:
            if self.attention_lost is None or self._attends is self._backend:
                raise
            self.attention_lost(e)
            return self._attend(x, layer, cache, start)

    def _attend(self, x: F32, layer: int, cache: KvCache, start: int) -> F32:
        if self._fused is None:
            y = self._attention(self._before(x, layer, "attn"), layer, cache, start)
            return self._after(x, y, layer, "attn")
        out = np.empty_like(x)
        self._fused.attention(self._attentions[layer], x, *cache.layer(layer), start, out)
        return out

    def _attention_spec(self, layer: int) -> AttentionSpec:
        model, arch, at = self._model, self.arch, f"layers.{layer}.attn"
        windowed, post = arch.has_window(layer), arch.norm_place == "post"
        norm = self._norms[f"{at}.norm"]
        parts: dict[str, Any] = {name: model.matrix(f"{at}.{name}.weight") for name in "qkvo"}
        parts |= {f"{name}_bias": self._vectors.get(f"{at}.{name}.bias") for name in "qkvo"}
        return AttentionSpec(
            heads=arch.n_heads,
            kv_heads=arch.n_kv_heads,
            head_dim=arch.head_dim,
            **parts,
            norm=None if post else norm,
            q_norm=self._norms.get(f"{at}.q_norm"),
            k_norm=self._norms.get(f"{at}.k_norm"),
            post_norm=self._norms.get(f"{at}.post_norm"),
            sum_norm=norm if post else None,
            rope=self._local_rope if windowed else self._rope,
            scale=arch.attn_scale,
            window=arch.window if windowed else None,
            softcap=arch.attn_softcap,
        )

    def _attention(self, x: F32, layer: int, cache: KvCache, start: int) -> F32:
        """Attention of tokens at ``start`` ..., x (n, d) -> (n, d), through the backend's ``linear``."""
        arch, at = self.arch, f"layers.{layer}.attn"
        windowed = arch.has_window(layer)
        rope = self._local_rope if windowed else self._rope

        def heads(name: str, count: int) -> F32:
            y = self._linear(x, f"{at}.{name}").reshape(len(x), count, arch.head_dim)
            if arch.qk_norm and name != "v":
                y = self._norms[f"{at}.{name}_norm"](y)
            y = y.swapaxes(0, 1)  # (count, n, head_dim)
            return rope.rotate(y, start) if rope and name != "v" else y

        q = heads("q", arch.n_heads)
        keys, values = cache.append(layer, heads("k", arch.n_kv_heads), heads("v", arch.n_kv_heads), start)
        window = arch.window if windowed else None
        y = attend(q, keys, values, scale=arch.attn_scale, window=window, softcap=arch.attn_softcap)
        return self._linear(y, f"{at}.o")

    def _ffn_block(self, xs: list[F32], layer: int) -> list[F32]:
        """The FFN of all chunks: those of one token sparse, the others dense and together."""
        inputs = [np.ascontiguousarray(self._before(x, layer, "ffn")) for x in xs]
        outs = [np.empty_like(x) for x in inputs]
        many = []
        for x, out in zip(inputs, outs, strict=True):
            if self.observer is not None:
                self.observer(layer, x)
            self.ffn_count.total += len(x) * self.arch.n_neurons
            if len(x) > 1:
                many.append((x, out))
        if many:
            self.ffn_count.active += self.ffns.dense(layer, many)
        for x, out in zip(inputs, outs, strict=True):
            if len(x) == 1:
                self.ffn_count.active += self.ffns.sparse(layer, x, self.predictor, out)
        bias = self._vectors.get(f"layers.{layer}.ffn.down.bias")
        ys = outs if bias is None else [out + bias for out in outs]
        return [self._after(x, y, layer, "ffn") for x, y in zip(xs, ys, strict=True)]

    def _linear(self, x: F32, name: str) -> F32:
        """(n, cols) -> (n, rows) through attention's weight and bias called ``name``."""
        weight = f"{name}.weight"
        out = np.empty((len(x), self._rows[weight]), np.float32)
        self._attends.linear(self._weights[weight], np.ascontiguousarray(x), out)
        bias = self._vectors.get(f"{name}.bias")
        return out if bias is None else out + bias

    def exact_head(self, x: F32, rows: Ids | None = None) -> F32:
        """The LM head on final states (n, d): all logits, or those of ``rows``, before scale and cap."""
        out = np.empty((len(x), self.arch.vocab_size if rows is None else len(rows)), np.float32)
        self._backend.linear(self._weights["head.weight"], np.ascontiguousarray(x), out, rows)
        return out

    def _norm(self, weight: str) -> Norm:
        kind = "rms" if weight.endswith(("q_norm.weight", "k_norm.weight")) else self.arch.norm
        bias = self._vectors.get(weight.removesuffix("weight") + "bias")
        return Norm(kind, self._vectors[weight], bias, self.arch.norm_eps)

    def _logits(self, x: F32) -> F32:
        if self.arch.final_norm:
            x = self._norms["final_norm"](x)
        logits = self.exact_head(x) if self.head is None else self.head(x)
        if self.arch.logit_scale != 1:
            logits *= np.float32(self.arch.logit_scale)
        if self.arch.logit_softcap is not None:
            cap = np.float32(self.arch.logit_softcap)
            logits = np.tanh(logits / cap) * cap
        return logits


def kv_dtype(backend: Backend) -> KvDType:
    """Of the KV cache: what the backend's own attention wants, or float32 for NumPy's."""
    return backend.kv_dtype if isinstance(backend, SupportsAttention) else np.float32
