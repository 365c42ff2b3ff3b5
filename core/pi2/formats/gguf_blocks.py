"""The blocks of GGUF's quantised tensors, decoded in NumPy.

Layouts: ggml-common.h and ggml-quants.c of the ggml project.  Q8_0 and Q4_0 are taken over bit for bit,
only laid out as pi2.tensor wants them; everything else becomes float32, by the reference's own order of
float32 operations, so that the values are the reference's to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from pi2.tensor import BLOCK, F32, U8, DType, Tensor, join_row

Decoder = Callable[[U8], F32]

F32_TYPE, F16_TYPE, Q4_0_TYPE, Q8_0_TYPE, BF16_TYPE = 0, 1, 2, 8, 30
BLOCKS: dict[int, tuple[int, int]] = {
    F32_TYPE: (1, 4),
    F16_TYPE: (1, 2),
    Q4_0_TYPE: (32, 18),
    3: (32, 20),
    6: (32, 22),
    7: (32, 24),
    Q8_0_TYPE: (32, 34),
    10: (256, 84),
    11: (256, 110),
    12: (256, 144),
    13: (256, 176),
    14: (256, 210),
    BF16_TYPE: (1, 2),
}
"""Type -> (weights in a block, bytes of a block), for the types that pi2 decodes."""

_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


def type_name(kind: int) -> str:
    """What ggml calls this type of tensor."""
    return _NAMES.get(kind, f"number {kind}")


def exact_dtype(kind: int) -> DType | None:
    """pi2's own format for a type, None where only float32 holds its values."""
    own: dict[int, DType] = {F32_TYPE: "f32", F16_TYPE: "f16", Q4_0_TYPE: "q4_0", Q8_0_TYPE: "q8_0"}
    return own.get(kind)


def to_tensor(raw: U8, kind: int) -> Tensor:
    """(rows, bytes of a row) as they lie in the file -> the same weights as pi2 stores them.

    Plain floats are not copied; Q8_0 and Q4_0 rows keep every bit; other types are decoded to f32.
    """
    rows, cols = raw.shape[0], _cols(raw, kind)
    dtype = exact_dtype(kind)
    if dtype in ("f32", "f16"):
        return Tensor(raw, dtype, cols)
    if dtype is not None:
        out = np.empty(raw.shape, np.uint8)
        for at in range(0, rows, step := _step(cols)):
            blocks = raw[at : at + step].reshape(-1, cols // BLOCK, BLOCKS[kind][1])
            scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[:, :, 0]
            out[at : at + step] = join_row(blocks[:, :, 2:].reshape(len(blocks), -1), scales)
        return Tensor(out, dtype, cols)
    return Tensor(decode_rows(raw, kind).view(np.uint8), "f32", cols)


def decode_rows(raw: U8, kind: int) -> F32:
    """(rows, bytes of a row) -> (rows, cols) float32."""
    out = np.empty((raw.shape[0], _cols(raw, kind)), np.float32)
    for rows, values in _portions(raw, kind):
        out[rows] = values
    return out


def transpose(raw: U8, kind: int) -> Tensor:
    """(rows, bytes of a row) -> the transposed matrix (cols, rows), as f16 if it was that, else as f32."""
    cols = _cols(raw, kind)
    if kind == F16_TYPE:
        turned = np.ascontiguousarray(raw.view(np.uint16).T)
        return Tensor(turned.view(np.uint8), "f16", raw.shape[0])
    out = np.empty((cols, raw.shape[0]), np.float32)
    for rows, values in _portions(raw, kind):
        out[:, rows] = values.T
    return Tensor(out.view(np.uint8), "f32", raw.shape[0])


def _cols(raw: U8, kind: int) -> int:
    weights, size = BLOCKS[kind]
    return int(raw.shape[1]) // size * weights


def _step(cols: int) -> int:
    """Rows that make about 1 MB of float32."""
    return max(1, (1 << 18) // cols)


def _portions(raw: U8, kind: int) -> Iterator[tuple[slice, F32]]:
    """Rows decoded about 1 MB at a time, so that what is allocated besides the result stays small.

    Damaged scales may be infinite: the values are then what IEEE 754 says, without a warning.
    """
    cols = _cols(raw, kind)
    step = _step(cols)
    with np.errstate(invalid="ignore", over="ignore"):
        for at in range(0, raw.shape[0], step):
            part = np.ascontiguousarray(raw[at : at + step])
            yield slice(at, at + step), _DECODERS[kind](part.reshape(-1, BLOCKS[kind][1])).reshape(-1, cols)


def _half(raw: U8) -> F32:
    """(n, 2k) bytes -> (n, k) float32 from float16."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _fields(raw: U8, bits: int, group: int) -> U8:
    """Unpack fields of ``bits`` bits: of every ``group`` bytes first all lowest fields, then the next.

    (n, bytes) -> (n, bytes * 8 / bits) uint8.
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    grouped = raw.reshape(raw.shape[0], -1, 1, group) >> shifts
    return (grouped & np.uint8((1 << bits) - 1)).reshape(raw.shape[0], -1)


def _bf16(blocks: U8) -> F32:
    return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _f32(blocks: U8) -> F32:
    return blocks.view(np.float32)


def _q8_0(blocks: U8) -> F32:
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * _half(blocks[:, :2])


def _q4_0(blocks: U8) -> F32:
    return _half(blocks[:, :2]) * (_fields(blocks[:, 2:], 4, 16).astype(np.float32) - np.float32(8))


def _q4_1(blocks: U8) -> F32:
    return _half(blocks[:, :2]) * _fields(blocks[:, 4:], 4, 16).astype(np.float32) + _half(blocks[:, 2:4])


def _fifth_bits(packed: U8) -> U8:
    """(n, 4) bytes -> (n, 32): bit i of the little-endian word, worth 16."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(blocks: U8) -> F32:
    quants = _fields(blocks[:, 6:], 4, 16) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks[:, :2]) * (quants.astype(np.float32) - np.float32(16))


def _q5_1(blocks: U8) -> F32:
    quants = _fields(blocks[:, 8:], 4, 16) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks[:, :2]) * quants.astype(np.float32) + _half(blocks[:, 2:4])


def _q2_k(blocks: U8) -> F32:
    """16 x (4-bit scale, 4-bit minimum) | 256 x 2 bits | d | dmin."""
    n = blocks.shape[0]
    scale = _half(blocks[:, 80:82]) * (blocks[:, :16] & 15).astype(np.float32)
    minimum = _half(blocks[:, 82:84]) * (blocks[:, :16] >> 4).astype(np.float32)
    quants = _fields(blocks[:, 16:80], 2, 32).reshape(n, 16, 16).astype(np.float32)
    return (scale[:, :, None] * quants - minimum[:, :, None]).reshape(n, 256)


def _q3_k(blocks: U8) -> F32:
    """256 x high bit | 256 x 2 bits | 16 x 6-bit scale | d; a clear high bit subtracts 4."""
    n = blocks.shape[0]
    scales = _fields(blocks[:, 96:104], 4, 8) | (_fields(blocks[:, 104:108], 2, 4) << np.uint8(4))
    scale = _half(blocks[:, 108:110]) * (scales.astype(np.float32) - np.float32(32))
    low = _fields(blocks[:, 32:96], 2, 32).astype(np.int8)
    high = _fields(blocks[:, :32], 1, 32).astype(np.int8)
    quants = (low - 4 * (1 - high)).astype(np.float32).reshape(n, 16, 16)
    return (scale[:, :, None] * quants).reshape(n, 256)


def _scales_and_minima(blocks: U8) -> tuple[F32, F32]:
    """The head of Q4_K and Q5_K: d | dmin | 8 x (6-bit scale, 6-bit minimum), spread over 12 bytes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, (third & 15) | ((first >> 2) & 48)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | ((second >> 2) & 48)), axis=1)
    d, dmin = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return d * scales.astype(np.float32), dmin * minima.astype(np.float32)


def _affine_k(blocks: U8, quants: U8) -> F32:
    scale, minimum = _scales_and_minima(blocks)
    values = quants.reshape(-1, 8, 32).astype(np.float32)
    return (scale[:, :, None] * values - minimum[:, :, None]).reshape(-1, 256)


def _q4_k(blocks: U8) -> F32:
    return _affine_k(blocks, _fields(blocks[:, 16:], 4, 32))


def _q5_k(blocks: U8) -> F32:
    high = _fields(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _affine_k(blocks, _fields(blocks[:, 48:], 4, 32) | high)


def _q6_k(blocks: U8) -> F32:
    """256 x low 4 bits | 256 x high 2 bits | 16 x int8 scale | d."""
    n = blocks.shape[0]
    quants = _fields(blocks[:, :128], 4, 64) | (_fields(blocks[:, 128:192], 2, 32) << np.uint8(4))
    scales: NDArray[np.int8] = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    scale = _half(blocks[:, 208:210]) * scales.astype(np.float32)
    values = (quants.astype(np.float32) - np.float32(32)).reshape(n, 16, 16)
    return (scale[:, :, None] * values).reshape(n, 256)


_DECODERS: dict[int, Decoder] = {
    F32_TYPE: _f32,
    F16_TYPE: _half,
    Q4_0_TYPE: _q4_0,
    3: _q4_1,
    6: _q5_0,
    7: _q5_1,
    Q8_0_TYPE: _q8_0,
    10: _q2_k,
    11: _q3_k,
    12: _q4_k,
    13: _q5_k,
    14: _q6_k,
    BF16_TYPE: _bf16,
}
