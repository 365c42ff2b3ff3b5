"""The OpenCL backend: its place in pi2, without its kernels yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi2.api import Backend, FfnSpec, Probe
from pi2.errors import PluginError
from pi2.tensor import F32, U8, Ids, Tensor

# Where drivers are found: the loader's registry on Linux, the vendor's library on Android.
_ICDS = "etc/OpenCL/vendors"
_ANDROID = ("vendor/lib64/libOpenCL.so", "system/vendor/lib64/libOpenCL.so")


class OpenclBackend(Backend):
    """Kernels for Adreno and other GPUs will be here.  This version has no kernel."""

    name = "opencl"

    @classmethod
    def probe(cls) -> Probe:
        return Probe(
            0,
            "not built yet: OpenCL kernels will be here, this version has the registration only"
            f" ({describe_drivers(Path('/'))})",
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


def describe_drivers(root: Path) -> str:
    """The OpenCL drivers that are registered below ``root``."""
    found = [str(Path("/") / lib) for lib in _ANDROID if (root / lib).exists()]
    try:
        found += sorted(icd.name for icd in (root / _ICDS).glob("*.icd"))
    except OSError:
        return f"/{_ICDS} cannot be read"
    if not found:
        return f"this machine has no OpenCL driver: nothing in /{_ICDS}"
    return f"OpenCL drivers on this machine: {', '.join(found)}"


def _not_built() -> PluginError:
    return PluginError("the opencl backend is not built yet", hint="use --backend numpy")
