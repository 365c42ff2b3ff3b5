"""The C interface of the kernels, one declaration a function (pi2_cpu.h)."""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from importlib.resources import as_file, files
from typing import ClassVar

from pi2.api import FfnSpec
from pi2.tensor import U8, DType

DTYPES: dict[DType, int] = {"f32": 0, "f16": 1, "q8_0": 2, "q4_0": 3}
NO_DTYPE = -1
ACTIVATIONS = {"relu": 0, "relu2": 1, "silu": 2, "gelu": 3, "gelu_tanh": 4}


class Matrix(ctypes.Structure):
    _fields_: ClassVar = [
        ("data", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("row_bytes", c_int64),
        ("dtype", c_int32),
    ]


class Ffn(ctypes.Structure):
    _fields_: ClassVar = [
        ("bundles", c_void_p),
        ("count", c_int64),
        ("stride", c_int64),
        ("d_model", c_int64),
        ("gate", c_int32),
        ("up", c_int32),
        ("down", c_int32),
        ("gate_offset", c_int64),
        ("up_offset", c_int64),
        ("down_offset", c_int64),
        ("bias_offset", c_int64),
        ("activation", c_int32),
        ("up_relu", c_int32),
    ]


class Norm(ctypes.Structure):
    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("centred", c_int32)]


class Attention(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, Matrix) for name in ("q", "k", "v", "o")),
        *((name, c_void_p) for name in ("q_bias", "k_bias", "v_bias", "o_bias")),
        *((name, Norm) for name in ("norm", "q_norm", "k_norm", "post_norm", "sum_norm")),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rope_dims", c_int32),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    ]


class Place(ctypes.Structure):
    _fields_: ClassVar = [("file", c_int64), ("offset", c_int64), ("ffn", c_int32)]


class StreamCount(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_int64) for name in ("active", "present", "reads", "bytes_read")),
        *((name, c_double) for name in ("wall_s", "wait_s", "gate_s", "up_down_s")),
    ]


class Slots(ctypes.Structure):
    _fields_: ClassVar = [
        *((name, c_void_p) for name in ("slot_of", "key_of", "states", "touched", "free", "n_free")),
        ("neurons", c_int64),
    ]


class Failure(ctypes.Structure):
    _fields_: ClassVar = [("code", c_int32), ("offset", c_int64)]


def ffn_of(bundles: U8, neurons: int, spec: FfnSpec) -> Ffn:
    """The C structure of ``bundles`` (k, stride), of an FFN that has so many neurons."""
    g = spec.geometry
    places = g.segments()
    return Ffn(
        bundles=bundles.ctypes.data,
        count=neurons,
        stride=bundles.strides[0],
        d_model=g.d_model,
        gate=NO_DTYPE if g.gate is None else DTYPES[g.gate],
        up=DTYPES[g.up],
        down=DTYPES[g.down],
        **{f"{name}_offset": places.get(name, (-1, 0))[0] for name in ("gate", "up", "down", "bias")},
        activation=ACTIVATIONS[spec.activation],
        up_relu=spec.up_relu,
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels' library with its functions declared, or None if this installation has none."""
    name = "libpi2_cpu.so"
    with as_file(files("pi2_backend_cpu") / name) as path:
        if not path.exists():
            return None
        lib = ctypes.CDLL(str(path))
    rows = [c_void_p, c_int64]  # int32 numbers or NULL, and how many rows
    call = [c_void_p, c_int64, *rows, c_void_p]  # x, n, rows, out
    chosen = [c_void_p, c_void_p, c_int64]  # neurons, slots, how many
    how = [c_int32, c_int64, c_int32, c_int32, c_int32]  # two_phase, cluster, trace, overlap, bundled
    streamed, failed = [c_void_p, POINTER(Place), *chosen], POINTER(Failure)
    cache = [c_void_p, c_void_p, c_int32, c_int64, c_int64]  # keys, values, dtype, room, start
    attention = [c_void_p, c_int64, *cache, c_void_p, c_void_p, c_void_p]  # x, n, cosines, sines, out
    signatures: dict[str, tuple[object, list[object]]] = {
        "pi2_cpu_isas": (c_char_p, []),
        "pi2_cpu_isa": (c_char_p, [c_void_p]),
        "pi2_cpu_open": (c_void_p, [c_int32, c_void_p, c_char_p, c_int32]),
        "pi2_cpu_close": (None, [c_void_p]),
        "pi2_cpu_linear": (None, [c_void_p, POINTER(Matrix), *call]),
        "pi2_cpu_low_rank": (
            c_int64,
            [c_void_p, POINTER(Matrix), c_void_p, POINTER(Matrix), c_void_p, c_void_p, c_void_p, c_void_p],
        ),
        "pi2_cpu_ffn": (c_int64, [c_void_p, POINTER(Ffn), *call]),
        "pi2_cpu_slab_ffn": (c_int64, [c_void_p, POINTER(Ffn), c_void_p, c_int64, *chosen, c_void_p]),
        "pi2_cpu_find_slots": (c_int64, [POINTER(Slots), c_int64, *rows, c_void_p]),
        "pi2_cpu_seat_slots": (c_int64, [POINTER(Slots), c_int64, *rows, c_void_p]),
        "pi2_cpu_stream_open": (
            c_void_p,
            [c_void_p, POINTER(Ffn), c_void_p, c_int64, c_void_p, c_int64, *how],
        ),
        "pi2_cpu_stream_begin": (None, [*streamed, c_void_p]),
        "pi2_cpu_stream_finish": (c_int32, [c_void_p, c_void_p, POINTER(StreamCount), failed]),
        "pi2_cpu_stream_prefetch": (c_int32, [*streamed, failed]),
        "pi2_cpu_stream_settle": (c_int64, [c_void_p, *rows, c_int32]),
        "pi2_cpu_stream_spans": (c_int64, [c_void_p, c_void_p]),
        "pi2_cpu_stream_close": (None, [c_void_p]),
        "pi2_cpu_attention": (None, [c_void_p, POINTER(Attention), *attention]),
    }
    for function, (result, arguments) in signatures.items():
        declared = getattr(lib, function)
        declared.restype, declared.argtypes = result, arguments
    return lib


def instruction_sets(lib: ctypes.CDLL) -> list[str]:
    """Those that the library has and this CPU can run, best first."""
    names: str = lib.pi2_cpu_isas().decode()
    return names.split("\n")
