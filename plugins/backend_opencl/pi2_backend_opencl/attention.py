"""An attention block: its matrices on the device; for many tokens the scores and the mixing, too.

Norms and RoPE are the host's, and so are scores of a single token: sending all keys for it costs more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pi2.attention import AttentionSpec, attend
from pi2.kv_cache import Kv
from pi2.tensor import F32

from pi2_backend_opencl.caps import LANES
from pi2_backend_opencl.device import Device
from pi2_backend_opencl.layout import GROUP
from pi2_backend_opencl.matrix import Inputs, Matrix, multiply, place_matrix, send_inputs


@dataclass(frozen=True, slots=True)
class Block:
    spec: AttentionSpec
    matrices: dict[str, Matrix]
    """q, k, v, o."""


def place_attention(device: Device, spec: AttentionSpec) -> Block:
    return Block(spec, {name: place_matrix(device, getattr(spec, name)) for name in "qkvo"})


def attention(
    device: Device, block: Block, x: F32, keys: Kv, values: Kv, start: int, out: F32, *, integers: bool
) -> None:
    """``pi2.powers.SupportsAttention.attention``."""
    spec, n = block.spec, len(x)
    if n == 0:
        return
    inputs = send_inputs(device, x if spec.norm is None else spec.norm(x), integers=integers)
    q, k, v = (_heads(device, block, inputs, name, start) for name in "qkv")
    keys[:, start : start + n], values[:, start : start + n] = k, v
    first = 0 if spec.window is None else max(0, start + 1 - spec.window)
    seen = keys[:, first : start + n], values[:, first : start + n]
    if n == 1:
        mixed = attend(q, *seen, scale=spec.scale, window=spec.window, softcap=spec.softcap)
        inputs = send_inputs(device, mixed, integers=integers)
    else:
        inputs = _mix(device, spec, q, *seen, start, first)
    y = _product(device, block, inputs, "o")
    y = x + (y if spec.post_norm is None else spec.post_norm(y))
    out[...] = y if spec.sum_norm is None else spec.sum_norm(y)


def _product(device: Device, block: Block, inputs: Inputs, name: str) -> F32:
    """(n, rows) of the matrix ``name`` and its bias."""
    matrix, bias = block.matrices[name], getattr(block.spec, f"{name}_bias")
    y = np.empty((inputs.tokens, matrix.shape.rows), np.float32)
    buffer = device.scratch("y", y.nbytes)
    multiply(device, matrix, inputs, None, buffer, matrix.shape.rows)
    device.fetch(buffer, y)
    return y if bias is None else y + bias


def _heads(device: Device, block: Block, inputs: Inputs, name: str, start: int) -> F32:
    """q, k or v behind its norm and RoPE, (heads, n, head_dim), C-contiguous."""
    spec = block.spec
    y = _product(device, block, inputs, name).reshape(inputs.tokens, -1, spec.head_dim)
    if name != "v":
        norm = getattr(spec, f"{name}_norm")
        y = y if norm is None else norm(y)
    y = np.ascontiguousarray(y.swapaxes(0, 1), np.float32)
    return spec.rope.rotate(y, start) if spec.rope and name != "v" else y


def _mix(device: Device, spec: AttentionSpec, q: F32, keys: Kv, values: Kv, start: int, first: int) -> Inputs:
    """Attention of all tokens, left on the device as the inputs of o."""
    heads, n, dim = q.shape
    width = -(-heads * dim // GROUP) * GROUP
    mixed = device.scratch("mixed", 4 * n * width)
    if width != heads * dim:
        device.clear(mixed, 4 * n * width)
    macros = {"DIMS": -(-dim // LANES), "HALVES": int(keys.dtype == np.float16)}
    sent = [device.send(name, part) for name, part in (("q", q), ("k", keys), ("v", values))]
    device.run(
        device.programs.kernel("attend", "attend", device.variant, **macros),
        (LANES, n, heads), (LANES, 1, 1),
        *sent, heads // spec.kv_heads, dim, n, start, first, keys.shape[1], spec.window or 0,
        np.float32(spec.scale), np.float32(spec.softcap or 0), mixed, width,
    )  # fmt: skip
    return Inputs(n, mixed, device.as_inputs(mixed), None)
