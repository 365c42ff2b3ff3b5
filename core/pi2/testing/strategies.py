"""Hypothesis strategies: matrices, FFNs, row subsets and byte ranges of awkward sizes and places.

Hypothesis chooses sizes, formats and a seed; NumPy fills the arrays, so that examples stay quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from numpy.random import Generator
from numpy.typing import NDArray

from pi2.api import FfnSpec, Ranges
from pi2.architecture import Activation
from pi2.bundle import BundleGeometry, Neurons
from pi2.tensor import BLOCK, DTYPES, F32, U8, DType, Ids, Tensor, row_bytes

# One less, as many, and one more than a vector register, a block of weights, or a cache line holds.
COLS = (1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 160)
COLS_QUANTISED = (32, 64, 96, 128, 160)
ROWS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 64, 65)
TOKENS = (0, 1, 2, 5, 33)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
SPARSE: tuple[Activation, ...] = ("relu", "relu2")

generators: SearchStrategy[Generator] = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@dataclass(frozen=True, slots=True)
class LinearCase:
    """One call of ``Backend.linear``: x (n, cols)."""

    weight: Tensor
    x: F32
    rows: Ids | None


@dataclass(frozen=True, slots=True)
class FfnCase:
    """One call of ``Backend.ffn``: bundles (k, stride), x (n, d_model)."""

    bundles: U8
    spec: FfnSpec
    x: F32
    rows: Ids | None

    @property
    def neurons(self) -> Neurons:
        """The exact weights of the neurons that take part."""
        every = self.spec.geometry.unpack(self.bundles)
        return every if self.rows is None else every[self.rows]


def displaced(array: NDArray[np.generic], nbytes: int) -> NDArray[np.generic]:
    """A C-contiguous copy of ``array`` that starts ``nbytes`` into a 64-byte aligned buffer."""
    room = np.empty(array.nbytes + nbytes + 64, np.uint8)
    at = -room.ctypes.data % 64 + nbytes
    copy = room[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def read_only(array: U8, nbytes: int) -> U8:
    """A displaced copy that cannot be written, as a view of a file would be."""
    copy = displaced(array, nbytes).view(np.uint8)
    copy.flags.writeable = False
    return copy


def row_bits(rng: Generator, dtype: DType, rows: int, cols: int, scale: float) -> U8:
    """(rows, row_bytes): every quant may occur, an eighth of the weights is zero."""
    if dtype in ("f32", "f16"):
        values = rng.normal(0, scale, (rows, cols)) * (rng.random((rows, cols)) > 0.125)
        return values.astype(np.float32 if dtype == "f32" else np.float16).view(np.uint8)
    split = row_bytes(dtype, cols) - 2 * (cols // BLOCK)
    quants = rng.integers(0, 256, (rows, split), dtype=np.uint8)
    scales = rng.normal(0, scale / (64 if dtype == "q8_0" else 4), (rows, cols // BLOCK))
    return np.concatenate((quants, scales.astype(np.float16).view(np.uint8)), axis=1)


@st.composite
def row_subsets(draw: DrawFn, count: int) -> Ids | None:
    """None, no row, one row, all of them, or any; ascending."""
    kind = draw(st.sampled_from(("none", "empty", "one", "all", "any")))
    if kind == "none":
        return None
    if kind == "empty" or count == 0:
        return np.empty(0, np.int32)
    if kind == "one":
        return np.array([draw(st.integers(0, count - 1))], np.int32)
    share = 1.0 if kind == "all" else draw(st.floats(0.05, 0.95))
    return np.flatnonzero(draw(generators).random(count) < share).astype(np.int32)


@st.composite
def inputs(draw: DrawFn, cols: int, tokens: SearchStrategy[int]) -> F32:
    """(n, cols) at any multiple of four bytes."""
    n, rng = draw(tokens), draw(generators)
    scale = draw(st.sampled_from((1e-3, 1.0, 30.0)))
    x = rng.normal(0, scale, (n, cols)).astype(np.float32)
    return displaced(x, 4 * draw(st.integers(0, 15))).view(np.float32)


@st.composite
def tensors(draw: DrawFn) -> Tensor:
    """A matrix in any format, read-only, at any byte: files align nothing that the format does not."""
    dtype = draw(st.sampled_from(DTYPES))
    cols = draw(st.sampled_from(COLS_QUANTISED if dtype in ("q8_0", "q4_0") else COLS))
    bits = row_bits(draw(generators), dtype, draw(st.sampled_from(ROWS)), cols, 1.0)
    return Tensor(read_only(bits, draw(st.integers(0, 63))), dtype, cols)


@st.composite
def linear_cases(draw: DrawFn, tokens: tuple[int, ...] = TOKENS) -> LinearCase:
    """A matrix of any format, inputs, and some or all of its rows."""
    weight = draw(tensors())
    x = draw(inputs(weight.cols, st.sampled_from(tokens)))
    return LinearCase(weight, x, draw(row_subsets(weight.rows)))


@st.composite
def ffn_specs(draw: DrawFn, activations: tuple[Activation, ...] = ACTIVATIONS) -> FfnSpec:
    """Gated or not, biased or not, every mixture of formats, every activation."""
    gated = draw(st.booleans())
    parts = [draw(st.sampled_from(DTYPES)) for _ in range(3)]
    quantised = {"q8_0", "q4_0"} & set(parts)
    d = draw(st.sampled_from(COLS_QUANTISED if quantised else COLS))
    page = draw(st.sampled_from((512, 4096)))
    geometry = BundleGeometry(d, parts[0] if gated else None, parts[1], parts[2], draw(st.booleans()), page)
    return FfnSpec(geometry, draw(st.sampled_from(activations)), gated and draw(st.booleans()))


@st.composite
def paged_specs(draw: DrawFn) -> FfnSpec:
    """Bundles of several pages, of which some have nothing but the gate and the head of up."""
    d, activation = draw(st.sampled_from((192, 320))), draw(st.sampled_from(SPARSE))
    parts: list[DType] = [draw(st.sampled_from(("f32", "f16", "q8_0"))) for _ in range(3)]
    return FfnSpec(BundleGeometry(d, parts[0], parts[1], parts[2], page=512), activation, draw(st.booleans()))


@st.composite
def ffn_cases(
    draw: DrawFn,
    tokens: tuple[int, ...] = TOKENS,
    activations: tuple[Activation, ...] = ACTIVATIONS,
    neurons: tuple[int, ...] = ROWS,
    specs: SearchStrategy[FfnSpec] | None = None,
) -> FfnCase:
    """An FFN, its inputs, and some or all of its neurons.  Padding is filled with ones."""
    spec, rng = draw(ffn_specs(activations) if specs is None else specs), draw(generators)
    geometry, k = spec.geometry, draw(st.sampled_from(neurons))
    bundles = np.full((k, geometry.stride), 255, np.uint8)
    for part, (offset, size) in geometry.segments().items():
        if part == "bias":
            bits = rng.normal(0, 1, (k, size // 4)).astype(np.float32).view(np.uint8)
        else:
            bits = row_bits(rng, getattr(geometry, part), k, geometry.d_model, geometry.d_model**-0.5)
        bundles[:, offset : offset + size] = bits
    x = draw(inputs(geometry.d_model, st.sampled_from(tokens)))
    place = read_only(bundles, draw(st.integers(0, 63)))
    return FfnCase(place, spec, x, draw(row_subsets(k)))


@st.composite
def ranges(draw: DrawFn, size: int) -> Ranges:
    """(n, 2) offsets and lengths within a file of ``size`` bytes: overlapping, empty, whole, in any order."""
    one = st.integers(0, size).flatmap(
        lambda at: st.tuples(st.just(at), st.sampled_from((0, 1, 512, size)) | st.integers(0, size))
    )
    chosen = draw(st.lists(one, max_size=8))
    fitting = [(at, min(length, size - at)) for at, length in chosen]
    return np.array(fitting, np.int64).reshape(-1, 2)
