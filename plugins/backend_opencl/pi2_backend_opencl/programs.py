"""Builds kernels, and keeps what was built: a driver may take seconds for one program."""

from __future__ import annotations

import hashlib
import os
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyopencl as cl
from pi2.errors import PluginError

from pi2_backend_opencl.caps import Variant

_FORMAT = "pi2-opencl-1"


class Programs:
    """Programs of one device.  ``folder``: where binaries are kept, or None."""

    def __init__(self, context: Any, device: Any, folder: Path | None) -> None:
        self._context, self._device, self._folder = context, device, folder
        self._built: dict[str, Any] = {}
        self._kernels: dict[tuple[str, str], Any] = {}
        self.compiled = 0
        """Programs that the driver had to compile."""
        self.loaded = 0
        """Programs that came from ``folder``."""

    def kernel(self, file: str, name: str, variant: Variant, **macros: int) -> Any:
        """Kernel ``name`` of kernels/``file``.cl, built once for these macros."""
        key = self._key(file, variant.flags(**macros))
        if (key, name) not in self._kernels:
            self._kernels[key, name] = self.own_kernel(file, name, variant, **macros)
        return self._kernels[key, name]

    def own_kernel(self, file: str, name: str, variant: Variant, **macros: int) -> Any:
        """The same, but another object at every call: its arguments are the caller's to keep."""
        flags = variant.flags(**macros)
        key = self._key(file, flags)
        if key not in self._built:
            self._built[key] = self._program(key, file, flags)
        return cl.Kernel(self._built[key], name)

    def _key(self, file: str, flags: list[str]) -> str:
        d = self._device
        parts = (
            _FORMAT, file, *flags, d.name, d.vendor, d.version, d.driver_version, d.platform.version
        )  # fmt: skip
        return hashlib.sha256("\0".join((*parts, _source(file))).encode()).hexdigest()

    def _program(self, key: str, file: str, flags: list[str]) -> Any:
        path = self._folder / f"{key}.clbin" if self._folder else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cl.CompilerWarning)  # drivers chat; errors are raised
            if path and path.exists():
                try:
                    program = cl.Program(self._context, [self._device], [path.read_bytes()]).build(
                        cache_dir=False
                    )
                except (cl.Error, OSError):
                    path.unlink(missing_ok=True)  # another driver's, or damaged: built anew
                else:
                    self.loaded += 1
                    return program
            try:
                program = cl.Program(self._context, _source(file)).build(flags, cache_dir=False)
            except cl.Error as e:
                raise PluginError(
                    f"the OpenCL driver of {self._device.name.strip()} refuses {file}.cl: {_brief(e)}",
                    hint="try --backend opencl:profile=minimal, and report the driver's version",
                ) from None
        self.compiled += 1
        if path:
            _keep(program, path)
        return program


def _source(file: str) -> str:
    folder = files("pi2_backend_opencl") / "kernels"
    return (folder / "compat.cl").read_text() + (folder / f"{file}.cl").read_text()


def _keep(program: Any, path: Path) -> None:
    """Save the binary; whoever reads sees all of it or nothing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(program.get_info(cl.program_info.BINARIES)[0])
        part.replace(path)
    except OSError:
        return  # a full or read-only disk costs time at the next start, nothing else


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
    return (lines or [str(error).strip() or type(error).__name__])[0][:300]
