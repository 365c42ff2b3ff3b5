"""The KV cache: room that costs memory once it is used, and holds what was written."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pi2.errors import BudgetError
from pi2.kv_cache import KvCache
from pi2.testing.models import toy_architecture

DTYPES = st.sampled_from((np.float32, np.float16))
PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=8)
ARCH = toy_architecture()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@given(
    dtype=DTYPES, pieces=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1)
)
def test_what_is_appended_is_what_is_read(dtype, pieces, seed):
    rng, cache = np.random.default_rng(seed), KvCache(ARCH, sum(pieces), dtype)
    shape = (ARCH.n_layers, 2, ARCH.n_kv_heads, sum(pieces), ARCH.head_dim)
    tokens = rng.standard_normal(shape, np.float32).astype(dtype)
    for n in pieces:
        cache.reserve(cache.length + n)
        until = cache.length + n
        for layer, (keys, values) in enumerate(tokens[:, :, :, cache.length : until].astype(np.float32)):
            seen = cache.append(layer, keys, values)
            assert np.array_equal(seen, tokens[layer, :, :, :until])
        cache.advance(n)
    for layer in range(ARCH.n_layers):
        assert np.array_equal(cache.layer(layer), tokens[layer])
        assert all(part.flags.c_contiguous and part.dtype == dtype for part in cache.layer(layer))


@given(dtype=DTYPES, context=st.integers(0, 4000), limit=st.integers(1, 3000))
def test_memory_is_that_of_the_tokens_in_whole_pages(dtype, context, limit):
    arch = dataclasses.replace(ARCH, max_context=2000)
    cache = KvCache(arch, limit, dtype)
    used = min(context, limit, 2000)
    heads = arch.n_layers * 2 * arch.n_kv_heads
    exact = heads * used * arch.head_dim * np.dtype(dtype).itemsize
    assert exact <= cache.nbytes_for(context) <= exact + heads * 2 * 4096
    cache.reserve(used)
    assert cache.nbytes == cache.nbytes_for(used)
    cache.truncate(0)
    assert cache.nbytes == cache.nbytes_for(used)


def test_a_context_of_a_million_tokens_costs_nothing_before_they_come():
    before = resident_bytes()
    cache = KvCache(dataclasses.replace(ARCH, max_context=10**6))
    assert resident_bytes() - before < 8 << 20
    cache.reserve(1000)
    for layer in range(ARCH.n_layers):
        keys = np.ones((ARCH.n_kv_heads, 1000, ARCH.head_dim), np.float32)
        cache.append(layer, keys, keys)
    assert cache.nbytes_for(1000) / 2 < resident_bytes() - before < cache.nbytes_for(1000) + (8 << 20)


def test_more_than_the_limit_is_refused():
    cache = KvCache(ARCH, 16)
    cache.reserve(16)
    with pytest.raises(BudgetError, match="needs 17 tokens of context, there is room for 16"):
        cache.reserve(17)


def test_more_than_the_system_can_number_is_refused():
    with pytest.raises(BudgetError, match="cannot map a KV cache"):
        KvCache(dataclasses.replace(ARCH, max_context=2**60))
