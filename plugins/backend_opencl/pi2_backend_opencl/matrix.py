"""A matrix on the device, in shards that it can allocate, and its product with activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pi2.tensor import F32, Ids, Tensor

from pi2_backend_opencl.caps import LANES
from pi2_backend_opencl.device import Device, Work
from pi2_backend_opencl.layout import CODES, GROUP, PLANES, Shape, clustered

TOKENS = 4
"""Tokens that a work-item takes at a time, when there are several."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows ``first`` ... ``first + rows - 1``."""

    first: int
    rows: int
    words: Any
    scales: Any


@dataclass(frozen=True, slots=True)
class Matrix:
    shape: Shape
    kind: int  # WEIGHTS of kernels/rows.cl
    shards: list[Shard]


@dataclass(frozen=True, slots=True)
class Inputs:
    """Activations (tokens, groups * 32) on the device; for one token their bytes, too, if they are wanted."""

    tokens: int
    buffer: Any
    image: Any | None
    quantised: tuple[Any, Any, Any] | None


def place_matrix(device: Device, tensor: Tensor) -> Matrix:
    """Copy a matrix to the device."""
    shape = Shape(tensor.dtype, tensor.rows, tensor.cols)
    limits = device.variant.limits
    most = max(1, limits.max_allocation // max(shape.cluster_bytes, 1))
    kind, most = _kind(device, shape, most)
    shards = []
    for first in range(0, shape.clusters, most):
        count = min(most, shape.clusters - first)
        words, scales = clustered(tensor, first, count)
        texels = (count * LANES, shape.groups * PLANES[shape.dtype])
        if kind == 2:
            wide = words.view("V16").reshape(count, -1, LANES).transpose(1, 0, 2)
            words = np.ascontiguousarray(wide).view(np.uint8)
        start = first * LANES
        rows = min(count * LANES, shape.rows - start)
        shards.append(Shard(start, rows, device.words(words, kind, texels), device.fixed(scales)))
    return Matrix(shape, kind, shards)


def _kind(device: Device, shape: Shape, most: int) -> tuple[int, int]:
    """How weights are read, and clusters a shard: an image where the device has one that large."""
    limits = device.variant.limits
    if not limits.images or (shape.dtype == "f16" and "HAVE_FP16" not in device.variant.macros_map):
        return 0, most
    in_line = limits.image_buffer_texels * 16 // max(shape.cluster_bytes, 1)
    if in_line >= min(most, shape.clusters):
        return 1, most
    if shape.groups * PLANES[shape.dtype] <= limits.image2d_side and limits.image2d_side >= LANES:
        return 2, min(most, limits.image2d_side // LANES)
    return 0, most


def send_inputs(device: Device, x: F32, *, integers: bool) -> Inputs:
    """Activations (n, cols) to the device, padded with zeros to whole groups."""
    x = padded(x)
    n = len(x)
    buffer = device.send("x", x)
    quantised = None
    if integers and n == 1:
        quants, scales, sums = quantise(x[0])
        quantised = (device.send("xq", quants), device.send("xs", scales), device.send("xsum", sums))
    return Inputs(n, buffer, device.as_inputs(buffer), quantised)


def padded(x: F32) -> F32:
    """(n, cols) with zeros behind, to whole groups."""
    n, cols = x.shape
    missing = -cols % GROUP
    return x if missing == 0 else np.concatenate((x, np.zeros((n, missing), np.float32)), axis=1)


def quantise(x: F32) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """(cols,) -> bytes (cols,), scales (groups,), sums of the bytes (groups,), in blocks of 32 as q8_0."""
    blocks = x.reshape(-1, GROUP).astype(np.float64)
    largest = np.abs(blocks).max(axis=1)
    finite = np.isfinite(largest)
    scales = np.where(finite, largest, np.nan) / 127
    safe = np.where(finite & (largest > 0), scales, 1.0)
    quants = np.rint(np.where(finite[:, None], blocks, 0.0) / safe[:, None]).astype(np.int8)
    return quants.ravel(), scales.astype(np.float32), quants.sum(axis=1, dtype=np.int32)


def multiply(device: Work, matrix: Matrix, x: Inputs, rows: Ids | None, y: Any, count: int) -> None:
    """Enqueue y[t * count + j] = row ``rows[j]`` (or j) . x[t], j < ``count``; y is a buffer of floats."""
    for number, shard in enumerate(matrix.shards):
        first, n, ids = shard.first, min(shard.rows, count - shard.first), device.nothing
        if rows is not None:
            first, end = np.searchsorted(rows, (shard.first, shard.first + shard.rows)).tolist()
            n = end - first
            if n:
                ids = device.send(f"rows{number}", rows[first:end])
        if n > 0:
            _multiply_shard(
                device, matrix, shard, x, (ids, int(rows is not None), shard.first, n), y, count, first
            )


def _multiply_shard(
    device: Work, matrix: Matrix, shard: Shard, x: Inputs, which: tuple[Any, int, int, int],
    y: Any, count: int, first: int,
) -> None:  # fmt: skip
    variant, shape = device.variant, matrix.shape
    dtype = CODES[shape.dtype]
    lanes = -(-which[3] // LANES) * LANES
    group = (LANES, variant.splits, 1)
    if x.quantised and dtype >= 2:
        macros = {"DTYPE": dtype, "TOKENS": 1, "WEIGHTS": matrix.kind, "INPUTS": 0}
        kernel = device.programs.kernel("rows", "rows_times_bytes", variant, **macros)
        device.run(
            kernel, (lanes, variant.splits, 1), group,
            shard.words, shard.scales, shape.groups, *x.quantised, *which, y, first,
        )  # fmt: skip
        return
    tokens = 1 if x.tokens == 1 else TOKENS
    inputs = x.buffer if x.image is None else x.image
    macros = {"DTYPE": dtype, "TOKENS": tokens, "WEIGHTS": matrix.kind, "INPUTS": int(x.image is not None)}
    kernel = device.programs.kernel("rows", "rows_times", variant, **macros)
    device.run(
        kernel, (lanes, variant.splits, -(-x.tokens // tokens)), group,
        shard.words, shard.scales, shape.groups, inputs, x.tokens, *which, y, count, first,
    )  # fmt: skip
