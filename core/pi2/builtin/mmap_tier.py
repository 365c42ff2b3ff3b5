"""The reference storage tier: files mapped into memory, read through the page cache."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any
from weakref import finalize

import numpy as np

from pi2.api import Probe, Ranges, StorageTier
from pi2.errors import StorageError
from pi2.memory import ask_for_huge_pages
from pi2.tensor import U8


class MmapTier(StorageTier):
    """Everything through the operating system's page cache; views cost no copy.

    ``read`` does not go through the mapping: what was read that way would count as this process's memory.
    """

    name = "mmap"

    def __init__(self) -> None:
        self._files: dict[int, tuple[Path, U8]] = {}
        self._descriptors: dict[int, int] = {}
        self._closers: list[finalize[Any, Any]] = []
        self._next = 0

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, "memory-mapped files, through the page cache")

    def open_file(self, path: Path) -> int:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._closers.append(finalize(self, os.close, descriptor))
            size = os.fstat(descriptor).st_size
            mapped = _map(descriptor) if size else b""
        except OSError as e:
            raise StorageError(e.strerror or str(e), path=path) from None
        handle = self._next
        self._next += 1
        self._files[handle] = (path, np.frombuffer(mapped, np.uint8))
        self._descriptors[handle] = descriptor
        return handle

    def read(self, file: int, ranges: Ranges, into: U8) -> None:
        filled = 0
        for offset, nbytes in ranges.tolist():
            self._check(file, offset, nbytes)
            self._fill(file, offset, into[filled : filled + nbytes])
            filled += nbytes

    def _fill(self, file: int, offset: int, into: U8) -> None:
        path = self._files[file][0]
        while len(into):
            try:
                n = os.preadv(self._descriptors[file], [into.data], offset)
            except OSError as e:
                raise StorageError(e.strerror or str(e), path=path, offset=offset) from None
            if n == 0:
                raise StorageError("the file shrank while it was open", path=path, offset=offset)
            into, offset = into[n:], offset + n

    def view(self, file: int, offset: int, nbytes: int) -> U8:
        """Read-only bytes, without copying (api.SupportsView)."""
        self._check(file, offset, nbytes)
        return self._files[file][1][offset : offset + nbytes]

    def _check(self, file: int, offset: int, nbytes: int) -> None:
        path, data = self._files[file]
        end = offset + nbytes
        if offset < 0 or nbytes < 0 or end > len(data):
            raise StorageError(
                f"{nbytes} bytes wanted, the file has {len(data)}",
                path=path, offset=offset, hint="the file was cut short; convert the model again",
            )  # fmt: skip
        if path.stat().st_size < end:  # touching a page past the end would be a SIGBUS
            raise StorageError("the file shrank while it was open", path=path, offset=offset)

    def close(self) -> None:
        self._files.clear()
        self._descriptors.clear()
        for closer in self._closers:
            closer()
        self._closers.clear()


def _map(descriptor: int) -> mmap.mmap:
    """A whole file; in huge pages, where kernel and file system cache files in them (Linux 6.16 on ext4)."""
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    ask_for_huge_pages(mapped)
    return mapped
