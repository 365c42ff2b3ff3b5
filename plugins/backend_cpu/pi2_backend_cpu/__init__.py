"""The CPU backend of pi2."""

from __future__ import annotations

from pi2.api import Backend
from pi2.hookspecs import hookimpl

PI2_API_VERSION = 1


@hookimpl
def pi2_backends() -> list[type[Backend]]:
    from pi2_backend_cpu.backend import CpuBackend

    return [CpuBackend]
