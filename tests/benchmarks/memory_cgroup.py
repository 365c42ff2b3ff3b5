"""A memory cgroup for one process, page cache included: v1 or v2, whichever this machine lets us make."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


class MemoryCgroup:
    """``path`` takes processes through cgroup.procs; gone on exit, when they have ended."""

    def __init__(self, limit_bytes: int) -> None:
        self.version = 2 if (ROOT / "cgroup.controllers").exists() else 1
        parent = ROOT if self.version == 2 else ROOT / "memory"
        self.path = parent / f"pi2-benchmark-{os.getpid()}"
        self.limit_bytes = limit_bytes

    def __enter__(self) -> MemoryCgroup:
        try:
            self.path.mkdir()
            limit = "memory.max" if self.version == 2 else "memory.limit_in_bytes"
            (self.path / limit).write_text(str(self.limit_bytes))
        except OSError as e:
            raise SystemExit(f"no memory cgroup can be made here: {e}") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self.path.rmdir()

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
