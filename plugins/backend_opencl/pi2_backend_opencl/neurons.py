"""An FFN on the device: gate, up, what is between, and down as a sum of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pi2.api import FfnSpec
from pi2.tensor import F32, U8, DType, Ids, Tensor

from pi2_backend_opencl.caps import LANES
from pi2_backend_opencl.device import Device, Work
from pi2_backend_opencl.layout import CODES, padded_rows
from pi2_backend_opencl.matrix import TOKENS, Inputs, Matrix, multiply, place_matrix, send_inputs

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
    plans: dict[tuple[int, int], Any] = field(default_factory=dict)
    """What was made ready: (tokens, neurons) -> ``plans.Plan``."""


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
    step = _PAGE // math.gcd(g.stride, _PAGE)  # rows between those that begin at a page, as a shard has to
    limit = device.variant.limits.max_allocation
    shared = (
        device.caps.unified_memory
        and min(step, len(bundles)) * g.stride <= limit
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
    most = max(1, limit // max(stride, 1))
    if shared and most < len(rows):
        most = most // step * step
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
    active = 0
    for some in pieces(x):
        output = enqueue(device, ffn, send_inputs(device, x[some], integers=integers), rows, n)
        raw = np.empty(output.nbytes, np.uint8)
        device.fetch(output.buffer, raw)
        active += output.take(raw, out[some])
    return active


def pieces(x: F32) -> list[slice]:
    """Tokens that are computed at a time."""
    return [slice(t, t + _MOST_TOKENS) for t in range(0, len(x), _MOST_TOKENS)]


@dataclass(frozen=True, slots=True)
class Output:
    """A buffer with results (tokens, width), and behind them counts of activations."""

    buffer: Any
    tokens: int
    width: int
    counts: int

    @property
    def nbytes(self) -> int:
        return 4 * (self.tokens * self.width + self.counts)

    def take(self, raw: U8, out: F32) -> int:
        """Bring the bytes of the buffer to ``out`` (tokens, d_model); how many neurons were active."""
        end = 4 * self.tokens * self.width
        out[:] = raw[:end].view(np.float32).reshape(self.tokens, self.width)[:, : out.shape[1]]
        return int(raw[end : self.nbytes].view(np.int32).sum())


def enqueue(device: Work, ffn: Ffn, inputs: Inputs, rows: Ids | None, n: int) -> Output:
    """All launches of an FFN over ``rows``, or its first ``n`` neurons."""
    tokens, width = inputs.tokens, -(-ffn.d_model // 32) * 32
    up = device.scratch("up", 4 * tokens * n)
    multiply(device, ffn.up, inputs, rows, up, n)
    hidden = up
    if ffn.gate is not None:
        hidden = device.scratch("gate", 4 * tokens * n)
        multiply(device, ffn.gate, inputs, rows, hidden, n)
    ids = device.nothing if rows is None else device.send("rows", rows)
    groups = -(-n // LANES)
    first = tokens * width
    result = device.scratch("out", 4 * (first + tokens * groups))
    combine = device.programs.kernel("neurons", "combine", device.variant)
    device.run(
        combine, (groups * LANES, tokens), (LANES, 1),
        hidden, up, int(ffn.gate is not None), ffn.activation, int(ffn.up_relu),
        device.nothing if ffn.biases is None else ffn.biases, int(ffn.biases is not None),
        ids, int(rows is not None), n, result, first,
    )  # fmt: skip
    _add_down(device, ffn, hidden, n, tokens, rows, ids, result)
    return Output(result, tokens, width, tokens * groups)


def _add_down(
    device: Work, ffn: Ffn, hidden: Any, n: int, tokens: int, rows: Ids | None, ids: Any, result: Any
) -> None:
    variant = device.variant
    groups = -(-ffn.d_model // 32)
    each = 1 if tokens == 1 else TOKENS
    macros = {"DTYPE": CODES[ffn.down_dtype], "TOKENS": each}
    every = n if rows is None else ffn.neurons
    bounds = every * np.arange(variant.splits + 1) // variant.splits
    starts = bounds if rows is None else np.searchsorted(rows, bounds)
    for number, shard in enumerate(ffn.down):
        ends = (shard.first, min(shard.first + shard.rows, every))
        low, high = ends if rows is None else np.searchsorted(rows, ends)
        if number > 0 and low >= high:
            continue
        kernel = device.programs.kernel("down", "add_down", variant, **macros)
        mine = device.send(f"starts{number}", np.clip(starts, low, high).astype(np.int32))
        device.run(
            kernel, (-(-groups * 4 // LANES) * LANES, variant.splits, -(-tokens // each)),
            (LANES, variant.splits, 1),
            shard.buffer, np.int64(shard.stride), shard.offset, groups, hidden, n, tokens,
            ids, int(rows is not None), shard.first, mine, result, int(number > 0),
        )  # fmt: skip
