"""The reference storage tier: files mapped into memory, read through the page cache."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from pi2.api import Probe, Ranges, StorageTier
from pi2.errors import StorageError
from pi2.tensor import U8


class MmapTier(StorageTier):
    """Everything through the operating system's page cache; views cost no copy."""

    name = "mmap"

    def __init__(self) -> None:
        self._files: dict[int, tuple[Path, U8]] = {}
        self._next = 0

    @classmethod
    def probe(cls) -> Probe:
        return Probe(10, "memory-mapped files, through the page cache")

    def open_file(self, path: Path) -> int:
        try:
            with path.open("rb") as f:
                size = f.seek(0, 2)
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as e:
            raise StorageError(e.strerror or str(e), path=path) from None
        handle = self._next
        self._next += 1
        self._files[handle] = (path, np.frombuffer(mapped, np.uint8))
        return handle

    def read(self, file: int, ranges: Ranges, into: U8) -> None:
        filled = 0
        for offset, nbytes in ranges.tolist():
            into[filled : filled + nbytes] = self.view(file, offset, nbytes)
            filled += nbytes

    def view(self, file: int, offset: int, nbytes: int) -> U8:
        """Read-only bytes, without copying (api.SupportsView)."""
        path, data = self._files[file]
        end = offset + nbytes
        if offset < 0 or nbytes < 0 or end > len(data):
            raise StorageError(
                f"{nbytes} bytes wanted, the file has {len(data)}",
                path=path, offset=offset, hint="the file was cut short; convert the model again",
            )  # fmt: skip
        if path.stat().st_size < end:  # touching a page past the end would be a SIGBUS
            raise StorageError("the file shrank while it was open", path=path, offset=offset)
        return data[offset:end]

    def close(self) -> None:
        self._files.clear()
