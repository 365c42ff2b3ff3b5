"""The CPU backend: its place in pi2, without its kernels yet."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from pi2.api import Backend, FfnSpec, Probe
from pi2.errors import PluginError
from pi2.tensor import F32, U8, Ids, Tensor

# Instruction sets that kernels are planned for, as Linux spells them in /proc/cpuinfo.
_PLANNED = {
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "i8mm": "NEON int8 matrix product",
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
}


class CpuBackend(Backend):
    """Kernels for NEON, AVX2 and AVX-512 behind a C ABI will be here.  This version has no kernel."""

    name = "cpu"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(
            0,
            "not built yet: SIMD kernels will be here, this version has the registration only"
            f" ({describe_cpu(Path('/proc/cpuinfo'))})",
        )

    def __init__(self) -> None:
        raise _not_built()

    def place(self, weight: Tensor) -> object:
        raise _not_built()

    def linear(self, weight: Any, x: F32, out: F32, rows: Ids | None = None) -> None:
        raise _not_built()

    def place_ffn(self, bundles: U8, spec: FfnSpec) -> object:
        raise _not_built()

    def ffn(self, ffn: Any, x: F32, out: F32, rows: Ids | None = None) -> int:
        raise _not_built()


def describe_cpu(cpuinfo: Path) -> str:
    """The instruction sets of this CPU that kernels are planned for, as far as the system tells."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return f"this system does not tell what its {platform.machine()} CPU can do"
    listed = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    flags = set(listed.partition(":")[2].split())
    found = [name for flag, name in _PLANNED.items() if flag in flags]
    return (
        f"this CPU has {', '.join(found)}" if found else "this CPU has none of the planned instruction sets"
    )


def _not_built() -> PluginError:
    return PluginError("the cpu backend is not built yet", hint="use --backend numpy")
