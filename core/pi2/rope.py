"""Rotary position embedding and its scalings, as tables of cosines and sines."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pi2.architecture import Rope
from pi2.tensor import F32

F64 = NDArray[np.float64]


def inverse_frequencies(rope: Rope) -> F64:
    """Radians per position of each pair of dimensions, (dims / 2,), after scaling."""
    exponents = np.arange(0, rope.dims, 2, dtype=np.float64) / rope.dims
    frequencies: F64 = rope.theta**-exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(frequencies, rope)
    return frequencies


def _llama3(frequencies: F64, rope: Rope) -> F64:
    """Wavelengths beyond the original context are stretched, short ones kept (Llama 3.1 report)."""
    turns = rope.original_context * frequencies / (2 * math.pi)  # in the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return _blend(frequencies, keep, rope.factor)


def _yarn(frequencies: F64, rope: Rope) -> F64:
    """NTK by parts (YaRN, arXiv 2309.00071 §3.2): a ramp over dimensions between two rotation counts."""

    def dimension(rotations: float) -> float:
        ratio = rope.original_context / (rotations * 2 * math.pi)
        return rope.dims * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    ramp = (np.arange(rope.dims // 2) - low) / max(high - low, 1e-3)
    return _blend(frequencies, 1 - np.clip(ramp, 0, 1), rope.factor)


def _blend(frequencies: F64, keep: F64, factor: float) -> F64:
    """Frequencies where ``keep`` is 1, slowed down by ``factor`` where it is 0."""
    blended: F64 = frequencies * (keep + (1 - keep) / factor)
    return blended


class RopeTable:
    """Cosines and sines of positions, computed when first needed and kept."""

    def __init__(self, rope: Rope) -> None:
        self.dims = rope.dims
        self._frequencies = inverse_frequencies(rope)
        self._scale = rope.attn_factor if rope.kind == "yarn" else 1.0
        self._cos: F32 = np.empty((0, rope.dims // 2), np.float32)
        self._sin = self._cos

    def rotate(self, heads: F32, start: int) -> F32:
        """Rotate ``heads`` (h, n, head_dim) whose tokens stand at ``start``, ``start + 1``, ..."""
        cos, sin = (table[start:] for table in self.until(start + heads.shape[1]))  # (n, dims / 2)
        half = cos.shape[1]
        first, second = heads[..., :half], heads[..., half : 2 * half]
        rotated = (first * cos - second * sin, second * cos + first * sin)
        return np.concatenate((*rotated, heads[..., 2 * half :]), axis=-1)

    def until(self, length: int) -> tuple[F32, F32]:
        """Cosines and sines of the positions below ``length``, (length, dims / 2) each, C-contiguous."""
        if length > len(self._cos):
            positions = np.arange(max(length, 2 * len(self._cos), 256), dtype=np.float64)
            angles = positions[:, None] * self._frequencies
            self._cos = (np.cos(angles) * self._scale).astype(np.float32)
            self._sin = (np.sin(angles) * self._scale).astype(np.float32)
        return self._cos[:length], self._sin[:length]
