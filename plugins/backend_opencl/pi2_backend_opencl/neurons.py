"""An FFN on the device: gate, up, what is between, and down as a sum of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from pi2.api import FfnSpec
from pi2.tensor import F32, U8, DType, Ids, Tensor

from pi2_backend_opencl.caps import LANES
from pi2_backend_opencl.device import Device
from pi2_backend_opencl.layout import CODES, padded_rows
from pi2_backend_opencl.matrix import TOKENS, Matrix, multiply, place_matrix, send_inputs

ACTIVATIONS = {"relu": 0, "relu2": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}
_PAGE = 4096
_MOST_TOKENS = 256  # at a time: bounds the memory for what lies between gate and down


@dataclass(frozen=True, slots=True)
class DownShard:
    """Down rows ``first`` ... ``first + rows - 1``, every ``stride`` bytes, from ``offset`` on."""

    first: int
    rows: int
    buffer: Any
    stride: int
    offset: int


@dataclass(frozen=True, slots=True)
class Ffn:
    neurons: int
    d_model: int
    gate: Matrix | None
    up: Matrix
    down_dtype: DType
    down: list[DownShard]
    biases: Any | None
    activation: int
    up_relu: bool
    kept: U8 | None
    """The caller's bytes, where the device reads them in place."""


def place_ffn(device: Device, bundles: U8, spec: FfnSpec) -> Ffn:
    """Bring bundles (neurons, stride) to the device; down is read in place where memory is shared."""
    g = spec.geometry

    def segment(name: str, dtype: DType) -> Tensor:
        offset, size = g.segments()[name]
        return Tensor(np.ascontiguousarray(bundles[:, offset : offset + size]), dtype, g.d_model)

    biases = None
    if g.biased:
        biases = device.fixed(g.unpack_segment(bundles, "bias"))
    down, kept = _place_down(device, bundles, spec)
    return Ffn(
        neurons=len(bundles),
        d_model=g.d_model,
        gate=None if g.gate is None else place_matrix(device, segment("gate", g.gate)),
        up=place_matrix(device, segment("up", g.up)),
        down_dtype=g.down,
        down=down,
        biases=biases,
        activation=ACTIVATIONS[spec.activation],
        up_relu=spec.up_relu,
        kept=kept,
    )


def _place_down(device: Device, bundles: U8, spec: FfnSpec) -> tuple[list[DownShard], U8 | None]:
    g = spec.geometry
    offset, size = g.segments()["down"]
    shared = (
        device.caps.unified_memory
        and g.d_model % 32 == 0
        and bundles.flags.c_contiguous
        and bundles.ctypes.data % _PAGE == 0  # else drivers copy
        and len(bundles) > 0
    )
    if shared:
        rows, place, stride = bundles, offset, bundles.shape[1]
    else:
        own = Tensor(np.ascontiguousarray(bundles[:, offset : offset + size]), g.down, g.d_model)
        rows, place = padded_rows(own), 0
        stride = rows.shape[1]
    most = max(1, device.variant.limits.max_allocation // max(stride, 1))
    if shared and most < len(rows):  # every shard has to begin at a page
        most = max(_PAGE, most // _PAGE * _PAGE)
    make = device.shared if shared else device.fixed
    shards = [
        DownShard(first, len(part), make(part), stride, place)
        for first in range(0, len(rows), most)
        if len(part := rows[first : first + most])
    ]
    return shards, bundles if shared else None


def compute(device: Device, ffn: Ffn, x: F32, out: F32, rows: Ids | None, *, integers: bool) -> int:
    """``pi2.api.Backend.ffn``."""
    n = ffn.neurons if rows is None else len(rows)
    if n == 0 or len(x) == 0:
        out[:] = 0
        return 0
    return sum(
        _some_tokens(device, ffn, x[t : t + _MOST_TOKENS], out[t : t + _MOST_TOKENS], rows, n, integers)
        for t in range(0, len(x), _MOST_TOKENS)
    )


def _some_tokens(device: Device, ffn: Ffn, x: F32, out: F32, rows: Ids | None, n: int, integers: bool) -> int:
    tokens = len(x)
    inputs = send_inputs(device, x, integers=integers)
    up = device.scratch("up", 4 * tokens * n)
    multiply(device, ffn.up, inputs, rows, up, n)
    hidden = up
    if ffn.gate is not None:
        hidden = device.scratch("gate", 4 * tokens * n)
        multiply(device, ffn.gate, inputs, rows, hidden, n)
    ids = device.nothing if rows is None else device.send("rows", rows)
    has_rows = int(rows is not None)
    active = device.send("active", np.zeros(1, np.int32))
    combine = device.programs.kernel("neurons", "combine", device.variant)
    device.run(
        combine, (-(-n // LANES) * LANES, tokens), (LANES, 1),
        hidden, up, int(ffn.gate is not None), ffn.activation, int(ffn.up_relu),
        device.nothing if ffn.biases is None else ffn.biases, int(ffn.biases is not None),
        ids, has_rows, n, tokens, active,
    )  # fmt: skip
    _add_down(device, ffn, hidden, n, tokens, rows, ids, out)
    count = np.empty(1, np.int32)
    device.fetch(active, count)
    return int(count[0])


def _add_down(
    device: Device, ffn: Ffn, hidden: Any, n: int, tokens: int, rows: Ids | None, ids: Any, out: F32
) -> None:
    variant = device.variant
    groups = -(-ffn.d_model // 32)
    each = 1 if tokens == 1 else TOKENS
    macros = {"DTYPE": CODES[ffn.down_dtype], "TOKENS": each}
    kernel = device.programs.kernel("down", "add_down", variant, **macros)
    result = device.scratch("out", 4 * tokens * groups * 32)
    bounds = ffn.neurons * np.arange(variant.splits + 1) // variant.splits
    starts = bounds if rows is None else np.searchsorted(rows, bounds)
    for number, shard in enumerate(ffn.down):
        ends = (shard.first, shard.first + shard.rows)
        low, high = ends if rows is None else np.searchsorted(rows, ends)
        mine = device.send(f"starts{number}", np.clip(starts, low, high).astype(np.int32))
        device.run(
            kernel, (-(-groups * 4 // LANES) * LANES, variant.splits, -(-tokens // each)),
            (LANES, variant.splits, 1),
            shard.buffer, np.int64(shard.stride), shard.offset, groups, hidden, n, tokens,
            ids, int(rows is not None), shard.first, mine, result, int(number > 0),
        )  # fmt: skip
    whole = np.empty((tokens, groups * 32), np.float32)
    device.fetch(result, whole)
    out[:] = whole[:, : ffn.d_model]
