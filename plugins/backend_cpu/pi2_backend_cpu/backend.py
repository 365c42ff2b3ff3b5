"""The backend ``cpu``: checks arrays once when they are placed, and passes addresses afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pi2.api import Backend, FfnSpec, Probe
from pi2.attention import AttentionSpec
from pi2.errors import OptionError, PluginError
from pi2.kv_cache import Kv, KvDType
from pi2.norm import Norm
from pi2.rope import RopeTable
from pi2.slot_tables import SlotTables
from pi2.tensor import F32, U8, Ids, Tensor

from pi2_backend_cpu import cores as cores_of
from pi2_backend_cpu import native
from pi2_backend_cpu.slots import Slots
from pi2_backend_cpu.streaming import Streaming

_MISSING = "the kernels are missing: this wheel was built without a C++ compiler"
_RUN_NATIVELY = ("avx512_vnni", "avx512", "avx2", "scalar")  # by us; the others only under qemu-user
_HINT = "install g++ or clang, then: python3 -m pip install --force-reinstall --no-deps ./plugins/backend_cpu"


@dataclass(frozen=True, slots=True)
class _Placed:
    """A C structure, the number of its rows, and the bytes that it points into."""

    struct: native.Matrix | native.Ffn
    rows: int
    bytes: U8


@dataclass(frozen=True, slots=True)
class _PlacedAttention:
    """A C structure, the tables of its RoPE, and the arrays that it points into."""

    struct: native.Attention
    rope: RopeTable | None
    arrays: list[F32 | U8]


class CpuBackend(Streaming, Backend):
    """SIMD kernels on weights where they lie; the same bits whatever the number of threads.

    ``activations`` "int8": quantised weights meet activations rounded to 8 bits in blocks of 32, as in
    llama.cpp; "f32": exact products, at about half the speed.  ``isa`` forces an instruction set.
    ``cpus`` ("4-7" or "0+2") pins a thread to each of these cores; without it, fewer threads than a
    big.LITTLE machine has cores are pinned to the fastest.
    """

    name = "cpu"
    tolerance: ClassVar[float] = 0.012  # half a step of 1/127 for x, and as much for the weights it meets

    def __init__(
        self,
        threads: int | None = None,
        activations: str = "int8",
        isa: str | None = None,
        cpus: str | None = None,
    ) -> None:
        library = native.library()
        if library is None:
            raise PluginError(_MISSING, hint=_HINT)
        if activations not in ("int8", "f32"):
            raise OptionError(f"activations are int8 or f32, not {activations!r}")
        threads, cores = _threads_and_cores(threads, cpus)
        self._lib = library
        self.kv_dtype: KvDType = np.float16 if activations == "int8" else np.float32
        wanted = None if isa is None else isa.encode()
        pins = None if cores is None else np.array(cores, np.int32)
        where = None if pins is None else pins.ctypes.data
        self._cpu = library.pi2_cpu_open(threads, where, wanted, int(activations == "int8"))
        if not self._cpu:
            known = ", ".join(native.instruction_sets(library))
            named = "kernels that PI2_CPU_ISA names" if isa is None else f"{isa} kernels"
            raise OptionError(f"there are no {named} for this CPU", hint=f"there are: {known}")
        pinned = "" if cores is None else f", on cores {'+'.join(map(str, cores))}"
        used = library.pi2_cpu_isa(self._cpu).decode()
        self._description = f"{used}, {threads} threads, {activations}{pinned}"

    @classmethod
    def probe(cls) -> Probe:
        library = native.library()
        if library is None:
            return Probe(0, f"{_MISSING}; {_HINT}")
        best = native.instruction_sets(library)[0]
        how = "" if best in _RUN_NATIVELY else ", which we have tested by emulation only"
        return Probe(20 if best == "scalar" else 100, f"{best} kernels{how}")

    def describe(self) -> str:
        return self._description

    def close(self) -> None:
        if self._cpu:
            self._lib.pi2_cpu_close(self._cpu)
            self._cpu = None

    def place(self, weight: Tensor) -> _Placed:
        data = np.ascontiguousarray(weight.data)
        return _Placed(_matrix(weight, data), weight.rows, data)

    def linear(self, weight: _Placed, x: F32, out: F32, rows: Ids | None = None) -> None:
        n_rows, row_ids = _selection(weight, rows)
        self._lib.pi2_cpu_linear(
            self._cpu, weight.struct, x.ctypes.data, len(x), row_ids, n_rows, out.ctypes.data
        )

    def low_rank(self, inner: _Placed, bias: F32, outer: _Placed, bounds: F32, x: F32) -> tuple[Ids, F32]:
        rows, above = np.empty(outer.rows, np.int32), np.empty(outer.rows, np.float32)
        count = self._lib.pi2_cpu_low_rank(
            self._cpu, inner.struct, bias.ctypes.data, outer.struct, bounds.ctypes.data, x.ctypes.data,
            rows.ctypes.data, above.ctypes.data,
        )  # fmt: skip
        return rows[:count], above[:count]

    def slot_search(self, tables: SlotTables) -> Slots:
        return Slots(self._lib, tables)

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> _Placed:
        data = np.ascontiguousarray(bundles)
        return _Placed(native.ffn_of(data, len(data), spec), len(data), data)

    def ffn(self, ffn: _Placed, x: F32, out: F32, rows: Ids | None = None) -> int:
        n_rows, row_ids = _selection(ffn, rows)
        active: int = self._lib.pi2_cpu_ffn(
            self._cpu, ffn.struct, x.ctypes.data, len(x), row_ids, n_rows, out.ctypes.data
        )
        return active

    def place_attention(self, spec: AttentionSpec) -> _PlacedAttention:
        struct = native.Attention()
        arrays: list[F32 | U8] = []

        def address(vector: F32 | None) -> int | None:
            if vector is None:
                return None
            arrays.append(np.ascontiguousarray(vector, np.float32))
            return arrays[-1].ctypes.data

        def norm(value: Norm | None) -> native.Norm:
            if value is None:
                return native.Norm()
            return native.Norm(
                address(value.weight), address(value.bias), value.eps, int(value.kind == "layer")
            )

        for name in ("q", "k", "v", "o"):
            weight = getattr(spec, name)
            data = np.ascontiguousarray(weight.data)
            arrays.append(data)
            setattr(struct, name, _matrix(weight, data))
            setattr(struct, f"{name}_bias", address(getattr(spec, f"{name}_bias")))
        for name in ("norm", "q_norm", "k_norm", "post_norm", "sum_norm"):
            setattr(struct, name, norm(getattr(spec, name)))
        for name in ("heads", "kv_heads", "head_dim", "scale"):
            setattr(struct, name, getattr(spec, name))
        struct.rope_dims = 0 if spec.rope is None else spec.rope.dims
        struct.window, struct.softcap = spec.window or 0, spec.softcap or 0
        return _PlacedAttention(struct, spec.rope, arrays)

    def attention(self, block: _PlacedAttention, x: F32, keys: Kv, values: Kv, start: int, out: F32) -> None:
        cosines = sines = None
        if block.rope:
            tables = block.rope.until(start + len(x))
            cosines, sines = (table.ctypes.data + start * table.strides[0] for table in tables)
        self._lib.pi2_cpu_attention(
            self._cpu,
            block.struct,
            x.ctypes.data,
            len(x),
            keys.ctypes.data,
            values.ctypes.data,
            native.DTYPES["f16" if keys.dtype == np.float16 else "f32"],
            keys.shape[1],
            start,
            cosines,
            sines,
            out.ctypes.data,
        )


def _threads_and_cores(threads: int | None, cpus: str | None) -> tuple[int, list[int] | None]:
    """How many threads, and the core of each (None: wherever the system puts them)."""
    if cpus is not None:
        cores = cores_of.parse_cores(cpus)
        if threads not in (None, len(cores)):
            raise OptionError(
                f"{threads} threads cannot be pinned to {len(cores)} cores", hint="name only cpus"
            )
        return len(cores), cores
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    if not 1 <= threads <= 1024:
        raise OptionError(f"{threads} threads cannot be", hint="as many as the machine has cores is best")
    return threads, cores_of.fastest(threads)


def _matrix(weight: Tensor, data: U8) -> native.Matrix:
    """The C structure of ``weight``, whose bytes lie in ``data``, C-contiguous."""
    address, dtype = data.ctypes.data, native.DTYPES[weight.dtype]
    return native.Matrix(address, weight.rows, weight.cols, data.shape[1], dtype)


def _selection(placed: _Placed, rows: Ids | None) -> tuple[int, int | None]:
    """How many rows, and the address of their numbers (None: all)."""
    if rows is None:
        return placed.rows, None
    return len(rows), rows.ctypes.data
