"""Conformance tests of ``pi2.powers.SupportsAttention``, an optional power; part of BackendTests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from numpy.random import Generator

from pi2.api import Backend
from pi2.architecture import Rope
from pi2.attention import AttentionSpec
from pi2.kv_cache import Kv, KvDType
from pi2.norm import Norm
from pi2.powers import SupportsAttention
from pi2.rope import RopeTable
from pi2.tensor import DTYPES, F32, Tensor
from pi2.testing.attention_reference import attention
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import displaced, generators, inputs, read_only, row_bits

_UNUSED: dict[int, Any] = {
    4: np.uint32(0x7FC0DEAD),
    2: np.uint16(0x7EAD),
}  # NaNs that no arithmetic makes, by size
HEADS = ((1, 1), (4, 4), (4, 2), (6, 1), (9, 3))  # and KV heads
HEAD_DIMS = (2, 10, 16, 32, 64, 80)
STARTS = (0, 5, 300)


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One call of ``attention``: x (n, d) behind keys and values (kv_heads, start, head_dim).

    Those are numbers that float16 has, so any cache holds them exactly.
    """

    spec: AttentionSpec
    x: F32
    keys: F32
    values: F32

    @property
    def start(self) -> int:
        return int(self.keys.shape[1])


@st.composite
def attention_specs(draw: DrawFn) -> AttentionSpec:
    """Every family's blocks and more: mixtures of formats, grouped heads, norms in all places."""
    rng = draw(generators)
    dtypes = [draw(st.sampled_from(DTYPES)) for _ in "qkvo"]
    quantised = bool({"q8_0", "q4_0"} & set(dtypes))
    d = draw(st.sampled_from((32, 96) if quantised else (7, 32, 65)))
    heads, kv_heads = draw(st.sampled_from(HEADS))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    if quantised and heads * head_dim % 32:
        heads, kv_heads, head_dim = 4, 2, 16
    shapes = {"q": (heads, d), "k": (kv_heads, d), "v": (kv_heads, d), "o": (d, heads)}
    parts: dict[str, Any] = {}
    for (name, (rows, cols)), dtype in zip(shapes.items(), dtypes, strict=True):
        rows, cols = (rows, cols * head_dim) if name == "o" else (rows * head_dim, cols)
        bits = row_bits(rng, dtype, rows, cols, cols**-0.5)
        parts[name] = Tensor(read_only(bits, draw(st.integers(0, 63))), dtype, cols)
        if draw(st.booleans()):
            parts[f"{name}_bias"] = rng.normal(0, 1, rows).astype(np.float32)
    widths = {"norm": d, "q_norm": head_dim, "k_norm": head_dim, "post_norm": d, "sum_norm": d}
    for name, width in widths.items():
        if draw(st.booleans()):
            parts[name] = _norm(rng, width, layer=draw(st.booleans()))
    dims = draw(st.sampled_from((0, 2, head_dim)))
    factor = draw(st.sampled_from((1.0, 1.3)))
    rope = Rope(theta=1e4, dims=dims, kind="yarn", factor=2.0, original_context=64, attn_factor=factor)
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=RopeTable(rope) if dims else None,
        scale=head_dim**-0.5,
        window=draw(st.sampled_from((None, 1, 4, 64, 65, 1000))),
        softcap=draw(st.sampled_from((None, 0.5, 20.0))),
        **parts,
    )


@st.composite
def attention_cases(draw: DrawFn, tokens: tuple[int, ...] = (0, 1, 2, 33)) -> AttentionCase:
    """A block, tokens, and what the cache holds before them."""
    spec, rng = draw(attention_specs()), draw(generators)
    x = draw(inputs(spec.q.cols, st.sampled_from(tokens)))
    shape = (spec.kv_heads, draw(st.sampled_from(STARTS)), spec.head_dim)
    keys, values = (rng.normal(0, 1, shape).astype(np.float16).astype(np.float32) for _ in "kv")
    return AttentionCase(spec, x, keys, values)


def _norm(rng: Generator, width: int, *, layer: bool) -> Norm:
    weight, bias = rng.normal(1, 0.3, (2, width)).astype(np.float32)
    return Norm("layer" if layer else "rms", weight, bias if layer else None, 1e-2)


def with_room(cached: F32, n: int, shift: int, dtype: KvDType = np.float32) -> Kv:
    """(kv_heads, start, h) -> (kv_heads, start + n + 3, h): room behind, full of NaN."""
    kv_heads, start, h = cached.shape
    unused = _UNUSED[np.dtype(dtype).itemsize]
    room: Kv = displaced(np.full((kv_heads, start + n + 3, h), unused), 4 * shift).view(dtype)
    room[:, :start] = cached
    return room


def call_attention(
    backend: SupportsAttention,
    block: object,
    case: AttentionCase,
    pieces: tuple[int, ...] = (),
    dtype: KvDType = np.float32,
) -> tuple[F32, Kv, Kv]:
    """Output (n, d) and the keys and values written, (kv_heads, n, h); checks what had to be left alone.

    ``pieces``: where the tokens are cut into several calls; ``dtype``: of the cache.
    """
    x, start, n = case.x, case.start, len(case.x)
    keys, values = (with_room(a, n, x.size % 5, dtype) for a in (case.keys, case.values))
    before, out = x.tobytes(), np.full_like(x, np.nan)
    for first, last in zip((0, *pieces), (*pieces, n), strict=True):
        backend.attention(block, x[first:last], keys, values, start + first, out[first:last])
    assert x.tobytes() == before, "changed its input"
    for now, cached in ((keys, case.keys), (values, case.values)):
        unused = _UNUSED[now.itemsize]
        assert np.array_equal(now[:, :start], cached), "changed older tokens of the cache"
        assert np.all(now[:, start + n :].view(unused.dtype) == unused), "wrote behind the tokens"
    return out, keys[:, start : start + n], values[:, start : start + n]


class AttentionTests(PluginTests):
    """What a backend with ``place_attention`` and ``attention`` promises; skipped for others."""

    @pytest.fixture(scope="class")
    @classmethod
    def attending(cls, backend: Backend) -> SupportsAttention:
        """The backend under test, if it has the power."""
        if not isinstance(backend, SupportsAttention):
            pytest.skip(f"{backend.name} has no attention (an optional power, pi2.powers.SupportsAttention)")
        return backend

    @examples(100)
    @given(case=attention_cases(), data=st.data())
    def test_attention_is_the_block_of_its_formula(
        self, attending: SupportsAttention, case: AttentionCase, data: st.DataObject
    ) -> None:
        backend = cast(Backend, attending)
        dtype = data.draw(st.sampled_from((np.float32, backend.kv_dtype)))
        block = attending.place_attention(case.spec)
        got = call_attention(attending, block, case, dtype=dtype)
        again = call_attention(attending, block, case, dtype=dtype)
        backend.release(block)
        halves = dtype == np.float16
        expected = attention(case.spec, case.x, case.keys, case.values, backend.tolerance, halves=halves)
        for name, result in zip(("keys", "values", "output"), (*got[1:], got[0]), strict=True):
            right = getattr(expected, name)
            assert right.accepts(result), f"{name} are off by {np.abs(result - right.values).max()}"
        assert [a.tobytes() for a in got] == [a.tobytes() for a in again], "the same call gave other bits"

    @examples(30)
    @given(case=attention_cases(tokens=(2, 33)), at=st.integers(1, 32))
    def test_attention_may_be_fed_in_pieces(
        self, attending: SupportsAttention, case: AttentionCase, at: int
    ) -> None:
        backend = cast(Backend, attending)
        block = attending.place_attention(case.spec)
        dtype = backend.kv_dtype
        out, _, _ = call_attention(attending, block, case, (min(at, len(case.x) - 1),), dtype)
        backend.release(block)
        expected = attention(
            case.spec, case.x, case.keys, case.values, backend.tolerance, halves=dtype == np.float16
        ).output
        assert expected.accepts(out), f"off by {np.abs(out - expected.values).max()}"
