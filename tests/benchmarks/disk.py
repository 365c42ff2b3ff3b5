"""How fast a file is read from its disk, past the page cache: large blocks in order, small ones anywhere."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from pi2.memory import aligned_bytes

SEQUENTIAL_BYTES = 2 << 20
SECTOR = 512  # direct reads are whole ones
READERS = 32  # reads in flight


def read_gb_s(
    path: Path, block: int, seconds: float = 2.0, *, ordered: bool, seed: int = 0, huge: bool = False
) -> float:
    """GB/s of direct reads of ``block`` bytes, ``READERS`` at a time; ``huge``: into huge pages."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    blocks = os.fstat(fd).st_size // block
    rng = np.random.default_rng(seed)
    first = int(rng.integers(blocks))
    places = (first + np.arange(1 << 18)) % blocks if ordered else rng.integers(0, blocks, 1 << 18)
    deadline = time.perf_counter() + seconds

    def reader(mine: Sequence[int]) -> int:
        buffer = aligned_bytes(block) if huge else np.frombuffer(mmap.mmap(-1, block), np.uint8)
        done = 0
        for place in mine:
            if time.perf_counter() > deadline:
                break
            done += os.preadv(fd, [buffer], int(place) * block)
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(reader, (places[i::READERS] for i in range(READERS))))
    elapsed = time.perf_counter() - start
    os.close(fd)
    return total / elapsed / 1e9


def speeds(path: Path, bundle: int, seconds: float = 2.0) -> dict[str, float]:
    """What the offloaded engine lives on; ``bundle``: bytes of a neuron."""
    return {
        "sequential_gb_s": read_gb_s(path, SEQUENTIAL_BYTES, seconds, ordered=True),
        "sequential_huge_pages_gb_s": read_gb_s(path, SEQUENTIAL_BYTES, seconds, ordered=True, huge=True),
        "random_bundle_gb_s": read_gb_s(path, -(-bundle // SECTOR) * SECTOR, seconds, ordered=False),
        "random_4096_gb_s": read_gb_s(path, 4096, seconds, ordered=False),
    }
