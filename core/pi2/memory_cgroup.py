"""A memory cgroup for one process, page cache included: v1 or v2, whichever this machine lets us make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pi2.errors import StorageError

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """``path`` takes processes through cgroup.procs; gone on exit, when they have ended."""

    def __init__(self, limit_bytes: int) -> None:
        self.version = 2 if (ROOT / "cgroup.controllers").exists() else 1
        parent = ROOT if self.version == 2 else ROOT / "memory"
        self.path = parent / f"pi2-bench-{os.getpid()}"
        self.limit_bytes = limit_bytes

    def __enter__(self) -> Self:
        """Raises StorageError if none can be made here."""
        try:
            self.path.mkdir(exist_ok=True)
            limit = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
            (self.path / limit).write_text(str(self.limit_bytes))
        except OSError as e:
            raise StorageError(
                f"no memory cgroup can be made here: {e.strerror or e}",
                path=self.path, hint="making one takes the rights of root, on Linux",
            ) from None  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        self.path.rmdir()

    def take(self, pid: int) -> None:
        """Charge what process ``pid`` takes from now on."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def figures(self) -> dict[str, int]:
        """Bytes that are charged now, the most so far, and of them the page cache and the process's own."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        now, peak, cache, own = (
            ("memory.current", "memory.peak", "file", "anon")
            if self.version == 2
            else ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "cache", "rss")
        )
        found = {"page_cache": int(stat[cache]), "anonymous": int(stat[own])}
        for name, file in (("now", now), ("peak", peak)):
            if (self.path / file).exists():
                found[name] = int((self.path / file).read_text())
        return found


def drop_page_cache(*paths: Path) -> None:
    """Give up the cached pages of these files, which nobody may have mapped meanwhile."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
