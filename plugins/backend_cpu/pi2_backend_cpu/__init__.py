"""Registers the backend ``cpu``: SIMD kernels for x86 and ARM."""

from __future__ import annotations

from pi2.api import Backend
from pi2.hookspecs import hookimpl

PI2_API_VERSION = 1


@hookimpl
def pi2_backends() -> list[type[Backend]]:
    from pi2_backend_cpu.backend import CpuBackend

    return [CpuBackend]
