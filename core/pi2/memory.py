"""How much memory this process has, and giving back what it does not need."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from pi2.tensor import U8

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_HUGE = 2 << 20  # bytes of a huge page, on most systems
_STATM, _STATUS = Path("/proc/self/statm"), Path("/proc/self/status")


def parse_bytes(text: str) -> int:
    """``2G`` -> 2 000 000 000, ``2GiB`` -> 2 147 483 648; also fractions.  ValueError for anything else."""
    body = text.strip().upper()
    binary = body.endswith("IB")
    body = body[: -2 if binary else -1] if body.endswith("B") else body
    unit = body[-1:] if body[-1:].isalpha() else ""
    power = list(_UNITS).index(unit) if unit in _UNITS else -1
    value = float(body.removesuffix(unit))
    if power < 0 or (binary and not power) or not 0 < value < float("inf"):
        raise ValueError(text)
    return int(value * (1024**power if binary else 1000**power))


def aligned_bytes(nbytes: int) -> U8:
    """(nbytes,) uint8, zeros, at a page boundary: direct reads then need no copy.

    Large ones lie in huge pages if the system has them: a device that is told of fewer pieces of memory reads
    twice as fast (``tests/benchmarks/disk.py``).
    """
    spare = _HUGE if nbytes >= _HUGE else 0
    memory = mmap.mmap(-1, max(1, nbytes + spare), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room: U8 = np.frombuffer(memory, np.uint8)
    start = -room.ctypes.data % _HUGE if spare else 0
    if spare:
        ask_for_huge_pages(memory, start, nbytes // _HUGE * _HUGE)
    return room[start : start + nbytes]


def ask_for_huge_pages(memory: mmap.mmap, start: int = 0, nbytes: int | None = None) -> None:
    """For large reads, and for memory that is looked at all over: page tables are walked less often."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, len(memory) - start if nbytes is None else nbytes)


def rss_bytes(process: int | None = None) -> int:
    """Resident set of this process now, its peak where the system does not say; or of another, 0 then."""
    if process is not None:
        statm = Path(f"/proc/{process}/statm")
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE if statm.exists() else 0
    try:
        descriptor = os.open(_STATM, os.O_RDONLY)  # after every token: Ctrl-C leaves no object open
    except FileNotFoundError:
        return rss_peak_bytes()
    try:
        return int(os.read(descriptor, 256).split()[1]) * mmap.PAGESIZE
    finally:
        os.close(descriptor)


def rss_peak_bytes() -> int:
    """Largest resident set of this program so far.

    By getrusage it would begin, on Linux, with that of the process that started this one.
    """
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_unused() -> None:
    """Return freed memory that the C library keeps for later to the system, where it can be asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
