"""Weights in memory: four storage formats, their byte layout, and exact conversion to and from float32.

A quantised row keeps all its quants first and all its scales after them, so that kernels load both in
whole vectors (the values are those of GGUF, whose blocks interleave the two):

    q8_0   cols x int8            | cols/32 x fp16 scale     value = q * scale
    q4_0   cols/32 x 16 bytes     | cols/32 x fp16 scale     value = (nibble - 8) * scale;
           byte j of a block holds element j in its low and element j + 16 in its high nibble
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pi2.errors import FormatError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]
Ids = NDArray[np.int32]
DType = Literal["f32", "f16", "q8_0", "q4_0"]

DTYPES: tuple[DType, ...] = get_args(DType)
BLOCK = 32  # weights that share one scale, as in GGUF
_BLOCK_BYTES = {"q8_0": BLOCK, "q4_0": BLOCK // 2}
_SCALE_BYTES = 2
_SMALLEST_INVERTIBLE = np.float32(3e-39)  # 1 / largest float32


def row_bytes(dtype: DType, cols: int) -> int:
    """Bytes of one row of ``cols`` weights.  Raises FormatError if ``cols`` cannot be quantised so."""
    if dtype == "f32":
        return 4 * cols
    if dtype == "f16":
        return 2 * cols
    if cols % BLOCK:
        raise FormatError(
            f"rows of {cols} weights cannot be stored as {dtype}: not a multiple of {BLOCK}",
            hint="use --quant f16 for this model",
        )
    return cols // BLOCK * (_BLOCK_BYTES[dtype] + _SCALE_BYTES)


def cols_of(dtype: DType, nbytes: int) -> int:
    """Inverse of :func:`row_bytes`.  Raises FormatError if no row of this format has ``nbytes``."""
    per = {"f32": (1, 4), "f16": (1, 2), "q8_0": (BLOCK, 34), "q4_0": (BLOCK, 18)}[dtype]
    if nbytes % per[1]:
        raise FormatError(f"a {dtype} row cannot have {nbytes} bytes")
    return nbytes // per[1] * per[0]


@dataclass(frozen=True, slots=True)
class Tensor:
    """A matrix in one of the storage formats.

    ``data`` is uint8 of shape (rows, row_bytes), C-contiguous, whatever the format; it may be a
    read-only view of a file.  ``cols`` is the number of weights in a row.
    """

    data: U8
    dtype: DType
    cols: int

    @property
    def rows(self) -> int:
        return int(self.data.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.cols

    def to_f32(self, rows: Ids | slice | None = None) -> F32:
        """The values, all rows or only ``rows``, as float32 of shape (rows, cols).  Exact."""
        data = self.data if rows is None else self.data[rows]
        return decode(data, self.dtype)

    @classmethod
    def from_f32(cls, values: F32, dtype: DType = "f32") -> Tensor:
        """Store ``values`` (rows, cols); q8_0 and q4_0 round as GGUF's reference quantiser does."""
        return cls(encode(values, dtype), dtype, int(values.shape[1]))


def decode(data: U8, dtype: DType) -> F32:
    """(n, row_bytes) uint8 -> (n, cols) float32, exactly."""
    data = np.ascontiguousarray(data)
    n = data.shape[0]
    if dtype == "f32":
        return data.view(np.float32)
    if dtype == "f16":
        return data.view(np.float16).astype(np.float32)
    cols = cols_of(dtype, data.shape[1])
    split = cols // BLOCK * _BLOCK_BYTES[dtype]
    scales = np.ascontiguousarray(data[:, split:]).view(np.float16).astype(np.float32)
    quants = data[:, :split]
    if dtype == "q8_0":
        values = np.ascontiguousarray(quants).view(np.int8).astype(np.float32)
    else:
        blocks = quants.reshape(n, cols // BLOCK, BLOCK // 2)
        nibbles = np.concatenate((blocks & 15, blocks >> 4), axis=2)  # (n, blocks, 32)
        values = nibbles.astype(np.float32) - np.float32(8)
    values = values.reshape(n, cols // BLOCK, BLOCK)
    values *= scales[:, :, None]
    return values.reshape(n, cols)


def encode(values: F32, dtype: DType) -> U8:
    """(n, cols) float32 -> (n, row_bytes) uint8."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    n, cols = values.shape
    width = row_bytes(dtype, cols)
    if dtype == "f32":
        return values.view(np.uint8).reshape(n, width)
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint8).reshape(n, width)
    blocks = values.reshape(n, cols // BLOCK, BLOCK)
    quants, scales = _quantise_q8(blocks) if dtype == "q8_0" else _quantise_q4(blocks)
    return join_row(quants.reshape(n, cols // BLOCK * _BLOCK_BYTES[dtype]), scales)


def join_row(quants: U8, scales: NDArray[np.float16]) -> U8:
    """Quants (n, bytes) and scales (n, blocks) -> rows of this module's layout."""
    tail = np.ascontiguousarray(scales).view(np.uint8).reshape(len(scales), _SCALE_BYTES * scales.shape[1])
    return np.concatenate((quants, tail), axis=1)


def _inverse(scale: F32) -> F32:
    """1 / scale; 0 where that is beyond float32, for then the scale is 0 as fp16 and so are the weights."""
    return np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > _SMALLEST_INVERTIBLE)


def _quantise_q8(blocks: F32) -> tuple[U8, NDArray[np.float16]]:
    """GGUF's q8_0: scale = max|x| / 127, quants rounded half away from zero."""
    scale = np.abs(blocks).max(axis=2) / np.float32(127)
    scaled = blocks * _inverse(scale)[:, :, None]
    size = np.abs(scaled)
    whole = np.floor(size)  # adding 0.5 would round 0.49999997 up
    rounded = np.copysign(whole + (size - whole >= np.float32(0.5)), scaled)
    return rounded.astype(np.int8).view(np.uint8), scale.astype(np.float16)


def _quantise_q4(blocks: F32) -> tuple[U8, NDArray[np.float16]]:
    """GGUF's q4_0: the weight of largest magnitude becomes -8, quants rounded half up."""
    place = np.abs(blocks).argmax(axis=2)
    scale = np.take_along_axis(blocks, place[:, :, None], axis=2)[:, :, 0] / np.float32(-8)
    shifted = blocks * _inverse(scale)[:, :, None] + np.float32(8.5)
    nibbles: U8 = np.minimum(shifted, 15).astype(np.uint8)
    half = BLOCK // 2
    return nibbles[:, :, :half] | (nibbles[:, :, half:] << np.uint8(4)), scale.astype(np.float16)
