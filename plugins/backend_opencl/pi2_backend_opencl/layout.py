"""pi2's rows, rearranged for waves: clusters of 64 rows, groups of 32 columns (kernels/rows.cl)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pi2.tensor import U8, DType, Tensor

from pi2_backend_opencl.caps import LANES

GROUP = 32
PLANES: dict[DType, int] = {"q4_0": 1, "q8_0": 2, "f16": 4, "f32": 8}
"""16-byte words that hold a row's weights of a group."""
CODES: dict[DType, int] = {"f32": 0, "f16": 1, "q8_0": 2, "q4_0": 3}


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a matrix on the device: ``groups`` columns / 32, ``clusters`` rows / 64, both rounded up."""

    dtype: DType
    rows: int
    cols: int

    @property
    def groups(self) -> int:
        return -(-self.cols // GROUP)

    @property
    def clusters(self) -> int:
        return -(-self.rows // LANES)

    @property
    def cluster_bytes(self) -> int:
        """Bytes of a cluster's words."""
        return self.groups * PLANES[self.dtype] * LANES * 16


def _body(tensor: Tensor) -> tuple[U8, U8 | None]:
    """Weights (rows, groups * planes * 16), padded with zeros, and the scales (rows, 2 * groups) if any."""
    groups = -(-tensor.cols // GROUP)
    data = np.ascontiguousarray(tensor.data)
    wide = groups * PLANES[tensor.dtype] * 16
    if tensor.dtype in ("q4_0", "q8_0"):
        return data[:, :wide], data[:, wide : wide + 2 * groups]
    if data.shape[1] == wide:
        return data, None
    padded = np.zeros((tensor.rows, wide), np.uint8)
    padded[:, : data.shape[1]] = data
    return padded, None


def clustered(tensor: Tensor, first: int, count: int) -> tuple[U8, U8]:
    """Words and scales of clusters ``first`` ... ``first + count - 1``, each flat, for rows.cl."""
    body, scales = _body(tensor)
    groups, planes = -(-tensor.cols // GROUP), PLANES[tensor.dtype]
    rows = slice(first * LANES, min((first + count) * LANES, tensor.rows))
    words = _lanes(body[rows], count, np.dtype("V16")).reshape(count, LANES, groups * planes)
    flat = np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint8).ravel()
    if scales is None:
        return flat, np.zeros(2, np.uint8)
    halves = _lanes(scales[rows], count, np.dtype("V2")).reshape(count, LANES, groups)
    return flat, np.ascontiguousarray(halves.transpose(0, 2, 1)).view(np.uint8).ravel()


def _lanes(rows: U8, clusters: int, unit: np.dtype[np.void]) -> NDArray[np.void]:
    """(rows, bytes) as units, with zero rows behind them until the clusters are full."""
    full = np.zeros((clusters * LANES, rows.shape[1]), np.uint8)
    full[: len(rows)] = rows
    return full.view(unit)


def padded_rows(tensor: Tensor) -> U8:
    """Rows as kernels/neurons.cl reads them: (rows, bytes), the columns a multiple of 32, then scales."""
    body, scales = _body(tensor)
    return np.ascontiguousarray(body if scales is None else np.concatenate((body, scales), axis=1))
