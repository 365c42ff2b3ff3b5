"""Attention blocks: as one graph each, or, with compiled contexts, as graphs of their matrices.

A graph is fed tokens divided by 2**e and has weights divided by 2**w, as FFNs do.  Scores need true numbers:
q and k are multiplied by 2**(e + w), which no norm of heads has done.  Values are kept below 1 by a power of
two of the whole call, that of the largest that they can be.  Norms before and behind the block, and
its sum, are the host's, in float32.  What fp16 cannot hold is the host's altogether.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from pi2.attention import AttentionSpec, attend
from pi2.kv_cache import Kv
from pi2.norm import Norm
from pi2.tensor import F32, Tensor

from pi2_backend_qnn import pack
from pi2_backend_qnn.placed import AttentionShape, Placed, Shape, rows_for
from pi2_backend_qnn.programs import Programs
from pi2_backend_qnn.scaling import Exponents, input_exponents, scaled
from pi2_backend_qnn.tokens import pad, pieces

_HIDDEN = -30000.0  # what hides a score: nothing is left of its share
_MOST = 2.0**14  # of q, k and older values; scores beyond fp16 show in the result
_LEAST = 32  # older tokens of the smallest graph that has any; others have 4, 16, ... times as many
_ONES = -14  # the least power of two of tokens, if there are biases
_EPS = (-14, 15)  # powers of two that are normal numbers in fp16

Multiply = Callable[[str, F32], F32]


def context_for(tokens: int) -> int:
    """Older tokens of the smallest graph that has room for so many."""
    room = _LEAST if tokens else 0
    while room < tokens:
        room *= 4
    return room


@dataclass(eq=False)
class Attention(Placed):
    """A block and its graphs; their shapes are tokens, and older tokens."""

    spec: AttentionSpec = field(kw_only=True)

    def __post_init__(self) -> None:
        sizes = {name: pack.sizes_of(w.data, w.dtype) for name, w in self._weights.items()}
        self.exponents = {name: pack.exponent(each.largest) for name, each in sizes.items()}
        biases = {name: getattr(self.spec, f"{name}_bias") for name in "qkv"}
        largest = {name: float(np.abs(b).max()) for name, b in biases.items() if b is not None}
        self.biased = bool(largest)
        self._reach = {name: (float(sizes[name].norms.max()), largest.get(name, 0.0)) for name in "qkv"}
        floors = [_ONES] if self.biased else []
        for name, bias in largest.items():  # so that what norms square stays in range
            floors.append(int(np.frexp(bias)[1]) - self.exponents[name] - 4)
        for name, norm in self._norms.items():  # and eps, too
            floors.append(int(np.log2(norm.eps) / 2 - 6) - self.exponents[name])
        self.least = max(floors, default=-126)

    def __str__(self) -> str:
        return f"an attention block of {self.spec.heads} heads"

    @property
    def _weights(self) -> dict[str, Tensor]:
        return {name: getattr(self.spec, name) for name in "qkvo"}

    @property
    def _norms(self) -> dict[str, Norm]:
        found = {name: getattr(self.spec, f"{name}_norm") for name in "qk"}
        return {name: norm for name, norm in found.items() if norm is not None}

    @property
    def shape(self) -> AttentionShape:
        s = self.spec
        dims = s.rope.dims if s.rope else 0
        return AttentionShape(
            s.heads,
            s.kv_heads,
            s.head_dim,
            dims,
            s.softcap,
            {name: norm.kind for name, norm in self._norms.items()},
        )

    @cached_property
    def digest(self) -> str:
        sha = hashlib.sha256(f"attention {self.shape} {self.exponents}\n".encode())
        for name, array in sorted(self.request((1, 0))[1].items()):
            sha.update(f"{name} {array.shape} {array.dtype}\n".encode() + array.tobytes())
        return sha.hexdigest()

    def request(self, shape: Shape) -> tuple[dict[str, Any], dict[str, Any]]:
        arrays: dict[str, Any] = {name: np.ascontiguousarray(w.data) for name, w in self._weights.items()}
        for name in "qkv":
            if (bias := getattr(self.spec, f"{name}_bias")) is not None:
                arrays[f"{name}_bias"] = bias
        for name, norm in self._norms.items():
            arrays[f"{name}_norm"] = norm.weight
            if norm.bias is not None:
                arrays[f"{name}_norm_bias"] = norm.bias
        formats = {name: (w.dtype, w.cols) for name, w in self._weights.items()}
        asked = {"do": "attention", "rows": shape[0], "context": shape[1], "shape": asdict(self.shape)}
        return asked | {"formats": formats, "exponents": self.exponents}, arrays

    def weight_bytes(self, shape: Shape) -> int:
        return sum(w.data.nbytes // pack.SHRINKS.get(w.dtype, 1) for w in self._weights.values())

    def reach(self, name: str, y: F32) -> float:
        """What no number of q, k or v exceeds, before norms of heads, if tokens are ``y`` (n, d)."""
        norm, bias = self._reach[name]
        with np.errstate(over="ignore"):
            return float(np.linalg.norm(y, axis=1).max(initial=0)) * norm + bias

    def fed(
        self, y: F32, e: Exponents, past: tuple[F32, F32], values: int, start: int, rows: int
    ) -> dict[str, F32]:
        """Inputs of a graph with so many ``rows``: y (n, d), ``past`` keys and values (kv_heads, used, h),
        ``values``: the power of two for values.
        """
        s, n, used = self.spec, len(y), past[0].shape[1]
        context = context_for(used)
        one, w = np.ones((n, 1), np.float32), self.exponents
        by = {name: one if name in self._norms else scaled(one, e + w[name]) for name in "qk"}
        by = {"q": by["q"] * np.float32(s.scale), "k": by["k"], "v": scaled(one, e + w["v"] - values)}
        fed = {f"{name}_by": pad(each, rows)[None] for name, each in by.items()}
        fed["x"] = pad(scaled(y, -e), rows)
        if self.biased:
            fed["ones"] = pad(scaled(one, -e), rows)
        for name, norm in self._norms.items():
            eps = np.ones((1, 1, rows, 1), np.float32)
            true = scaled(one * np.float32(norm.eps), -2 * (e + w[name]))
            eps[0, 0, :n] = true.clip(2.0 ** _EPS[0], 2.0 ** _EPS[1])
            fed[f"{name}_eps"] = eps
        if s.rope:
            cos, sin = (pad(table[start:], rows)[None] for table in s.rope.until(start + n))
            fed |= {"cos": cos, "sin": sin}
        if context:
            for name, each, power in zip("kv", past, (0, -values), strict=True):
                room = np.zeros((1, s.kv_heads, context, s.head_dim), np.float32)
                room[0, :, :used] = np.ldexp(each, power)
                fed[f"past_{name}"] = room
        fed["mask"] = np.tile(_mask(n, used, rows, context, s.window), (1, 1, s.heads // s.kv_heads, 1))
        return fed


def _mask(n: int, used: int, rows: int, context: int, window: int | None) -> F32:
    """What is added to scores, (1, 1, rows, context + rows): 0, or much less for tokens that are not seen."""
    mask = np.full((1, 1, rows, context + rows), _HIDDEN, np.float32)
    places = np.concatenate((np.arange(used), used + np.arange(n)))  # of tokens
    columns = np.concatenate((np.arange(used), context + np.arange(n)))
    age = used + np.arange(n)[:, None] - places
    seen = (age >= 0) & (age < (window or used + n))
    mask[0, 0, :n, columns] = np.where(seen, 0, _HIDDEN).astype(np.float32).T
    return mask


def run(programs: Programs, block: Attention, x: F32, keys: Kv, values: Kv, start: int, out: F32) -> None:
    """``pi2.powers.SupportsAttention.attention``.  Raises QnnError."""

    def exact(name: str, y: F32) -> F32:
        made: F32 = y @ getattr(block.spec, name).to_f32().T
        return made

    for part in pieces(len(x)):
        at = start + part.start
        if not _piece(programs, block, x[part], keys, values, at, out[part]):
            host(block.spec, exact, x[part], keys, values, at, out[part])


def _piece(programs: Programs, block: Attention, x: F32, keys: Kv, values: Kv, start: int, out: F32) -> bool:
    """False if fp16 cannot hold what comes up; then nothing counts."""
    spec, n = block.spec, len(x)
    y = x if spec.norm is None else spec.norm(x)
    first = 0 if spec.window is None else max(0, start + 1 - spec.window)
    past = tuple(each[:, first:start].astype(np.float32) for each in (keys, values))
    largest = [float(np.abs(each).max(initial=0)) for each in past]
    sizes = [*largest, block.reach("k", y), block.reach("q", y) * abs(spec.scale), block.reach("v", y)]
    if not np.isfinite(y).all() or not max(sizes) < _MOST:
        return False
    power = int(np.frexp(max(largest[1], block.reach("v", y)))[1])
    e = np.maximum(input_exponents(y), np.int32(block.least))
    shape = (rows_for(n), context_for(start - first))
    fed = block.fed(y, e, past, power, start, shape[0])  # type: ignore[arg-type]  # two of them
    new = (1, spec.kv_heads, shape[0], spec.head_dim)
    _, made = programs.begin(block, shape, fed, [(1, shape[0], spec.o.rows), new, new]).finish()
    mixed, k, v = (each[0, :n] if each.ndim == 3 else each[0, :, :n] for each in made)
    if not all(np.isfinite(each).all() for each in (mixed, k, v)):
        return False
    w, normed = block.exponents, spec.k_norm is not None
    keys[:, start : start + n] = k if normed else np.ldexp(k, (e + w["k"])[:, None])
    values[:, start : start + n] = np.ldexp(v, (e + w["v"])[:, None])
    out[...] = _behind(spec, x, np.ldexp(mixed, power + w["o"]))
    return True


def host(spec: AttentionSpec, multiply: Multiply, x: F32, keys: Kv, values: Kv, start: int, out: F32) -> None:
    """The block by NumPy, but for its products with matrices: ``multiply("q", y)``, (n, rows)."""
    n = len(x)
    with np.errstate(all="ignore"):
        y = x if spec.norm is None else spec.norm(x)
        q, k, v = (_heads(spec, multiply, y, name, start) for name in "qkv")
        keys[:, start : start + n], values[:, start : start + n] = k, v
        seen = (each[:, : start + n].astype(np.float32) for each in (keys, values))
        mixed = attend(q, *seen, scale=spec.scale, window=spec.window, softcap=spec.softcap)
        out[...] = _behind(spec, x, multiply("o", mixed))


def _heads(spec: AttentionSpec, multiply: Multiply, y: F32, name: str, start: int) -> F32:
    """q, k or v behind its norm and RoPE, (heads, n, h)."""
    made, bias = multiply(name, y), getattr(spec, f"{name}_bias")
    made = (made if bias is None else made + bias).reshape(len(y), -1, spec.head_dim)
    norm = None if name == "v" else getattr(spec, f"{name}_norm")
    heads: F32 = (made if norm is None else norm(made)).swapaxes(0, 1)
    return spec.rope.rotate(heads, start) if spec.rope and name != "v" else heads


def _behind(spec: AttentionSpec, x: F32, y: F32) -> F32:
    """Bias, norms and sum of a block that gave ``y`` (n, d)."""
    y = y if spec.o_bias is None else y + spec.o_bias
    y = x + (y if spec.post_norm is None else spec.post_norm(y))
    return y if spec.sum_norm is None else spec.sum_norm(y)
