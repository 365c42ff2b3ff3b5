"""Weights as the NPU wants them: normalised by a power of two, blocks of 32 as MatMulNBits has them.

fp16 ends at 65504 and is coarse below 2**-14, so every matrix is scaled by a power of two until its largest
weight is below 1, and every token's input likewise (``pi2_backend_qnn.scaling``).  That changes no digit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.tensor import BLOCK, F32, U8, DType, decode

from pi2_backend_qnn.errors import GraphRefused

BITS = {"q4_0": 4, "q8_0": 8}
SHRINKS = {"f32": 2}
"""Bytes of ours for one of QNN's; other weights are as large there."""
_ROUNDED = np.float32(1 + 2**-12)  # more than float32 loses of a sum
_LARGEST = {"q4_0": 8, "q8_0": 128}  # magnitude of a quant


@dataclass(frozen=True, slots=True)
class Quants:
    """Weights in blocks along a row: value = quant * scale.  quants (rows, cols), scales (rows, blocks)."""

    quants: NDArray[np.int8]
    scales: F32
    bits: int


def quants_of(data: U8, dtype: DType) -> Quants:
    """Rows (n, row_bytes) of q4_0 or q8_0, taken apart without a change."""
    bits = BITS[dtype]
    blocks = data.shape[1] // (BLOCK * bits // 8 + 2)
    split = blocks * BLOCK * bits // 8
    raw = np.ascontiguousarray(data[:, :split])
    scales = np.ascontiguousarray(data[:, split:]).view(np.float16).astype(np.float32)
    if bits == 8:
        return Quants(raw.view(np.int8), scales, bits)
    bytes_of_blocks = raw.reshape(len(data), blocks, BLOCK // 2)
    nibbles = np.concatenate((bytes_of_blocks & 15, bytes_of_blocks >> 4), axis=2)
    return Quants(nibbles.reshape(len(data), -1).astype(np.int8) - np.int8(8), scales, bits)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of rows of weights: what no weight exceeds, (n,), and what no row's 2-norm exceeds, (n,)."""

    largest: F32
    norms: F32


def sizes_of(data: U8, dtype: DType) -> Sizes:
    """Of the rows (n, row_bytes).  Raises GraphRefused if a weight is not finite."""
    if dtype in BITS and data.size:
        q = quants_of(data, dtype)
        blocks = q.quants.reshape(*q.scales.shape, BLOCK).astype(np.float32)
        parts = q.scales * np.sqrt(np.square(blocks).sum(axis=2))  # 2-norms of blocks
        largest = np.abs(q.scales).max(axis=1, initial=0) * np.float32(_LARGEST[dtype])
    else:
        parts = decode(data, dtype)
        largest = np.abs(parts).max(axis=1, initial=0)
    if not np.isfinite(largest).all():
        raise GraphRefused("a weight is not finite", hint="convert the model again")
    unit = np.where(largest > 0, largest, np.float32(1))[:, None]  # squares neither overflow nor vanish
    parts = parts / unit
    with np.errstate(over="ignore"):  # then there is no bound
        return Sizes(largest, largest * np.sqrt(np.square(parts).sum(axis=1)) * _ROUNDED)


def exponent(largest: F32) -> int:
    """The least e such that all weights of rows with these magnitudes are below 2**e; 0 if all are zero."""
    return int(np.frexp(largest.max(initial=0))[1])


def nbits(quants: NDArray[np.int8], bits: int) -> U8:
    """(N, K) -> B of MatMulNBits, (N, K / 32, bytes of a block): neighbours share a byte, the first low."""
    shifted = (quants.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        shifted = shifted[:, 0::2] | (shifted[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(shifted.reshape(len(quants), -1, BLOCK * bits // 8))


def outputs(rows: int) -> int:
    """Of the graph of a matrix with so many rows."""
    return max(2, rows)
