"""Facts about this machine, read from the system's own files; nothing is guessed, nothing changed."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_SIMD = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "amx_int8",
         "asimd", "asimddp", "i8mm", "sve", "fphp")  # fmt: skip
_IO_URING_SETUP = 425  # the same number on every architecture: it is younger than their unification


@dataclass(frozen=True, slots=True)
class Machine:
    """What ``pi2 doctor`` reports on.  Sizes in bytes."""

    cpu: str
    cores: int  # that this process may use
    simd: tuple[str, ...]
    memory_bytes: int
    memory_available_bytes: int
    cgroup_limit_bytes: int | None
    disk_free_bytes: int  # where the command was called
    python: str
    opencl_drivers: tuple[str, ...]
    io_uring: str  # "" if it works, else why not
    dsp_nodes: tuple[str, ...]

    @classmethod
    def here(cls) -> Self:
        """Look.  Takes milliseconds."""
        cpuinfo = _fields(Path("/proc/cpuinfo"))
        memory = _fields(Path("/proc/meminfo"))
        flags = f"{cpuinfo.get('flags', '')} {cpuinfo.get('Features', '')}".split()
        return cls(
            cpu=cpuinfo.get("model name") or platform.processor() or platform.machine(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            simd=tuple(name for name in _SIMD if name in flags),
            memory_bytes=_kibibytes(memory.get("MemTotal")),
            memory_available_bytes=_kibibytes(memory.get("MemAvailable")),
            cgroup_limit_bytes=cgroup_limit(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")),
            disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
            python=f"{platform.python_version()} at {sys.executable}",
            opencl_drivers=_opencl_drivers(Path("/etc/OpenCL/vendors")),
            io_uring=_io_uring(),
            dsp_nodes=tuple(sorted(str(p) for p in Path("/dev").glob("*dsprpc-smd*"))),
        )

    def version_of(self, tool: str) -> str:
        """The first line that ``tool --version`` prints."""
        try:
            done = subprocess.run(
                [tool, "--version"], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            return f"{tool} does not run: {e}"
        return (done.stdout or done.stderr).partition("\n")[0].strip()


def _fields(path: Path) -> dict[str, str]:
    """``name : value`` lines; of a name that repeats, the first.  Empty where the file is not readable."""
    fields: dict[str, str] = {}
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return fields
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _kibibytes(text: str | None) -> int:
    number = (text or "").split(" ")[0]
    return int(number) * 1024 if number.isdigit() else 0


def cgroup_limit(root: Path, membership: Path) -> int | None:
    """The lowest memory limit of this process's control groups (v2, or v1's memory controller)."""
    limits = []
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        v1 = "memory" in controllers.split(",")
        base = root / "memory" if v1 else root
        if controllers and not v1:
            continue
        place = base / group.lstrip("/")
        for directory in (place, *place.parents):
            limits += _limit_in(directory / ("memory.limit_in_bytes" if v1 else "memory.max"))
            if directory == base:
                break
    return min(limits, default=None)


def _limit_in(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() and int(text) < 1 << 60 else []  # v1 says "none" with a huge number


def _opencl_drivers(vendors: Path) -> tuple[str, ...]:
    """Names of the drivers that the OpenCL loader would find, or that an Android phone ships."""
    found = sorted(p.stem for p in vendors.glob("*.icd"))
    phone = [Path("/vendor/lib64/libOpenCL.so"), Path("/system/vendor/lib64/libOpenCL.so")]
    return tuple(found + [str(p) for p in phone if p.exists()])


def _io_uring() -> str:
    """Ask the kernel for an impossible ring: it says so only if it would have given a possible one."""
    if sys.platform != "linux":
        return "not Linux"
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(_IO_URING_SETUP, 0, None)
    code = ctypes.get_errno()
    if result >= 0 or code in (errno.EINVAL, errno.EFAULT):
        return ""
    return {errno.ENOSYS: "the kernel lacks it", errno.EPERM: "forbidden here (seccomp or sysctl)"}.get(
        code, os.strerror(code)
    )
