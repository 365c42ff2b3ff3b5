"""Conformance tests of ``pi2.powers.SupportsLowRank``, an optional power; part of BackendTests."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import Generator

from pi2.api import Backend
from pi2.powers import SupportsLowRank
from pi2.tensor import DTYPES, F32, DType, Tensor, encode
from pi2.testing.plugin import PluginTests, examples
from pi2.testing.strategies import generators


def _matrix(rng: Generator, dtype: DType, rows: int, cols: int) -> Tensor:
    values = rng.standard_normal((rows, cols), dtype=np.float32)
    return Tensor(encode(values, dtype), dtype, cols)


def _bounds(rng: Generator, scores: F32) -> F32:
    """About half of them exceeded; some that a score just reaches, and some that nothing tells about."""
    bounds: F32 = (scores * rng.choice((0.5, 1.0, 2.0), len(scores))).astype(np.float32)
    odd = rng.random(len(scores)) < 0.1
    bounds[odd] = rng.choice((np.inf, -np.inf, np.nan, 0), int(odd.sum()))
    return bounds


class LowRankTests(PluginTests):
    """What ``SupportsLowRank`` promises: what two products and comparisons give."""

    @pytest.fixture(scope="class")
    @classmethod
    def asked(cls, backend: Backend) -> Backend:
        """The opened backend, if it has the power."""
        if not isinstance(backend, SupportsLowRank):
            pytest.skip(f"{backend.name} asks no predictors (an optional power, pi2.powers.SupportsLowRank)")
        return backend

    @examples(100)
    @given(
        rng=generators,
        dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
        width=st.sampled_from((32, 64, 96)),
        rows=st.integers(1, 300),
        spoilt=st.booleans(),
    )
    def test_a_low_rank_predictor_names_what_two_products_name(
        self, asked: Backend, rng: Generator, dtypes: tuple[DType, DType], width: int, rows: int, spoilt: bool
    ) -> None:
        """Rows, their order and bits; a token that is no number has them all named."""
        inner = asked.place(_matrix(rng, dtypes[0], width, 64))
        outer = asked.place(_matrix(rng, dtypes[1], rows, width))
        bias, x = rng.standard_normal(width, np.float32), rng.standard_normal((1, 64), np.float32)
        if spoilt:
            bias[rng.integers(width)] = np.nan
        hidden, scores = np.empty((1, width), np.float32), np.empty((1, rows), np.float32)
        asked.linear(inner, x, hidden)
        asked.linear(outer, np.maximum(hidden + bias, 0), scores)
        bounds, before = _bounds(rng, scores[0]), x.tobytes()
        named, above = cast(SupportsLowRank, asked).low_rank(inner, bias, outer, bounds, x)
        expected = np.flatnonzero(~(scores[0] <= bounds))
        assert x.tobytes() == before
        assert named.dtype == np.int32
        assert above.dtype == np.float32
        assert named.tolist() == expected.tolist()
        np.testing.assert_array_equal(above, scores[0][expected] - bounds[expected])
        asked.release(inner)
        asked.release(outer)
